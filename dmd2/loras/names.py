"""Which module a LoRA's key means: by diffusers' names, by sgm's, and by how tools write both."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

MODEL_PARTS = ("unet", "text_encoder", "text_encoder_2")
# A key's beginning, with "_" for ".", and the model that it means. Tried in this order.
_PREFIXES = (
    ("lora_unet_", "unet"),  # kohya, OneTrainer
    ("lycoris_", "unet"),
    ("diffusion_model_", "unet"),  # ComfyUI
    ("unet_", "unet"),  # diffusers
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("text_encoder_2_", "text_encoder_2"),
    ("text_encoder_", "text_encoder"),
    ("", "unet"),  # peft, on a UNet alone
)
_PEFT_ROOT = "base_model_model_"

# sgm is Stability's own code, whose names SDXL's first weights had; kohya's trainers keep them.
_SGM_MODULES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_SGM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+s)\.(\d+)\.(.+)")
_LAST_OF_BLOCK = re.compile(r"up_blocks\.0\.resnets\.\d+\.conv1\.weight")
_ATTENTION = re.compile(r"(.+\.attn[12])\.(to_[qkv]|to_out)(?:\.0)?")
_TEXT_ATTENTION = re.compile(r"(.+\.self_attn)\.(q|k|v|out)_proj")


@dataclass(frozen=True)
class ModuleNames:
    """Every module of a model's parts that a LoRA may change, by all its spellings.

    Attributes:
        shapes: per part ("unet", "text_encoder", "text_encoder_2") the shape of each parameter.
        modules: per part, a spelling with "_" for "." to the module's own name.
    """

    shapes: Mapping[str, Mapping[str, torch.Size]]
    modules: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> ModuleNames:
        """From each part's parameters by name, on any device; a part may be missing."""
        shapes = {
            part: {name: tensor.shape for name, tensor in parameters.items()}
            for part, parameters in parts.items()
        }
        return cls(shapes, {part: _spellings(part, found) for part, found in shapes.items()})

    def find(self, spelling: str) -> tuple[str, str] | None:
        """The part and the module that a key means by what stands before its suffix."""
        flat = spelling.replace(".", "_")
        for prefix, part in _PREFIXES:
            if flat.startswith(prefix):
                name = flat.removeprefix(prefix).removeprefix(_PEFT_ROOT)
                if (module := self.modules.get(part, {}).get(name)) is not None:
                    return part, module
        return None


def sgm_name(module: str, blocks_per_level: int) -> str:
    """The name that sgm has for a module of diffusers' UNet.

    Args:
        module: the name in diffusers' UNet2DConditionModel in SDXL's shape.
        blocks_per_level: how many input or output blocks have one resolution: layers_per_block + 1.
    """
    match = _BLOCK.fullmatch(module)
    if match is None:
        return _SGM_MODULES.get(module, module)
    way, level, kind, layer, rest = match.groups()
    if way == "mid":
        block = f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}"
        return f"{block}.{_SGM_RESNET.get(rest, rest) if kind == 'resnets' else rest}"
    first = int(level) * blocks_per_level
    if kind == "downsamplers":
        return f"input_blocks.{first + blocks_per_level}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + blocks_per_level - 1}.2.{rest}"
    block = f"input_blocks.{1 + first + int(layer)}" if way == "down" else ""
    block = block or f"output_blocks.{first + int(layer)}"
    return f"{block}.0.{_SGM_RESNET.get(rest, rest)}" if kind == "resnets" else f"{block}.1.{rest}"


def blocks_per_level(unet: Iterable[str]) -> int:
    """What sgm_name wants to know, from the names of a UNet's parameters."""
    return sum(_LAST_OF_BLOCK.fullmatch(name) is not None for name in unet)


def _spellings(part: str, shapes: Mapping[str, torch.Size]) -> dict[str, str]:
    modules = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    if part == "unet":
        num_blocks = blocks_per_level(shapes)
        pairs = [(s, m) for m in modules for s in _unet_spellings(m, num_blocks)]
    else:
        pairs = [(s, m) for m in modules for s in _text_spellings(m)]
    return {spelling.replace(".", "_"): module for spelling, module in pairs}


def _unet_spellings(module: str, blocks_per_level: int) -> Iterator[str]:
    yield module
    yield sgm_name(module, blocks_per_level)
    if match := _ATTENTION.fullmatch(module):  # diffusers before 0.22
        yield from (f"{match[1]}.processor.{match[2]}", f"{match[1]}.{match[2]}")


def _text_spellings(module: str) -> Iterator[str]:
    """With and without text_model., which transformers has put in and out of its classes."""
    bare = module.removeprefix("text_model.")
    names = [bare]
    if match := _TEXT_ATTENTION.fullmatch(bare):  # diffusers before 0.22
        names.append(f"{match[1]}.to_{match[2]}")
    for name in names:
        yield from (name, f"text_model.{name}")
