"""Checkpoints of other people: each part's tensors, by diffusers' names.

A single file has the layout of Stability's own code (sgm): UNet, both text encoders and a VAE. The
VAE is not read: the manifest's takes its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmd2.errors import DownloadError
from dmd2.loras.names import blocks_per_level, sgm_name
from dmd2.model_card import read_json
from dmd2.store.kinds import (
    NOT_V,
    PREFIXES,
    SIGMAS,
    Header,
    Shape,
    check_kind,
    of_channels,
    of_dtypes,
    of_unknown,
)

if TYPE_CHECKING:
    import torch

Origin = tuple[str, Callable[["torch.Tensor"], "torch.Tensor"]]

# What OpenCLIP calls the modules of a layer of the second text encoder.
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ROOT = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_QKV = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}


def read_single_file(path: Path, folder: Path, part: str) -> dict[str, torch.Tensor]:
    """A part of the model in a single file; each key counts exactly once.

    Args:
        path: of the file.
        folder: the model folder that it is for; its part has a config.json.
        part: "unet", "text_encoder" or "text_encoder_2".

    Returns:
        Tensors in the file's dtypes, read from the disk when they are used.

    Raises:
        DownloadError: the file is none that can be taken, a key is missing or unknown, or a tensor
            has another shape.
    """
    import torch
    from safetensors import safe_open

    header, wanted = Header.read(path), _wanted(folder / part, part)
    check_kind(path.name, header)
    origins = _origins(part, wanted)
    found = {
        name: tuple(change(torch.empty(header.shapes[key], device="meta")).shape)
        for name, (key, change) in origins.items()
        if key in header.shapes
    }
    expected = {key for key, _ in origins.values()}
    unknown = [k for k in header.kept if k.startswith(PREFIXES[part]) and k not in expected]
    _check_shapes(path.name, part, wanted, found, unknown)
    with safe_open(path, framework="pt") as file:
        if part == "unet" and SIGMAS in header.shapes:
            _check_sigmas(path.name, file.get_tensor(SIGMAS), folder)
        return {name: change(file.get_tensor(key)) for name, (key, change) in origins.items()}


def read_folder_part(paths: Sequence[Path], folder: Path, part: str) -> dict[str, torch.Tensor]:
    """A part of the model in the file, or in all shards, that diffusers or transformers saved.

    Otherwise as read_single_file.
    """
    import torch
    from safetensors import safe_open

    wanted, weights = _wanted(folder / part, part), dict[str, torch.Tensor]()
    for path in paths:
        header = Header.read(path)
        keys = {_settled(part, key): key for key in header.kept}
        if twice := sorted(keys.keys() & weights.keys()):
            raise DownloadError(f"{path.name} is refused: {twice[0]} stands in another shard too")
        if reason := of_dtypes(header, header.kept):
            raise DownloadError(f"{path.name} is refused: {reason}")
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(key) for name, key in keys.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    unknown = [name for name in found if name not in wanted]
    _check_shapes(paths[0].name, part, wanted, found, unknown)
    return weights


def _check_shapes(
    name: str,
    part: str,
    wanted: Mapping[str, Shape],
    found: Mapping[str, Shape],
    unknown: Sequence[str],
) -> None:
    missing = [key for key in wanted if key not in found]
    others = [key for key, shape in wanted.items() if found.get(key, shape) != shape]
    if part == "unet" and len(first := found.get("conv_in.weight", ())) == 4 and first[1] != 4:
        reason = of_channels(first[1])
    elif missing:
        reason = (
            f"its {part} lacks {len(missing)} of SDXL's {len(wanted)} tensors ({missing[0]}), as "
            "SSD-1B and Segmind-Vega do. Take a model that was made from SDXL itself"
        )
    elif unknown:
        reason = of_unknown(unknown)
    elif others:
        reason = (
            f"{others[0]} of its {part} has the shape {list(found[others[0]])}, and SDXL's "
            f"{list(wanted[others[0]])}. Take a model that was made from SDXL itself"
        )
    else:
        return
    raise DownloadError(f"{name} is refused: {reason}")


def _check_sigmas(name: str, sigmas: torch.Tensor, folder: Path) -> None:
    """Refuse a file that brings another noise schedule along than the one it is to run by."""
    import torch
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    ours = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()
    theirs = sigmas.float().flatten().sort().values
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0.02, atol=0.01):
        raise DownloadError(
            f"{name} is refused: its noise schedule ({SIGMAS}) is not SDXL's: {NOT_V}"
        )


def _wanted(folder: Path, part: str) -> dict[str, Shape]:
    """The shape of each tensor that a part's config.json asks for."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = read_json(folder / "config.json")
    with init_empty_weights(include_buffers=False):
        if part == "unet":
            model: Any = UNet2DConditionModel.from_config(config)
        elif part == "text_encoder":
            model = CLIPTextModel(CLIPTextConfig.from_dict(config))
        else:
            model = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))
    return {_settled(part, key): tuple(t.shape) for key, t in model.state_dict().items()}


def _settled(part: str, key: str) -> str:
    """A key as SDXL's files have it: transformers has put text_model. in and out of its names."""
    if part == "unet" or key.startswith(("text_model.", "text_projection.")):
        return key
    return f"text_model.{key}"


def _origins(part: str, wanted: Mapping[str, Shape]) -> dict[str, Origin]:
    """For each of diffusers' names the key in a single file, and what its tensor goes through."""
    prefix = PREFIXES[part]
    if part == "text_encoder":
        return {name: (prefix + name, _as_it_is) for name in wanted}
    if part == "text_encoder_2":
        origins = {name: _open_clip_origin(name) for name in wanted}
        return {name: (prefix + key, change) for name, (key, change) in origins.items()}
    num_blocks = blocks_per_level(wanted)
    split = {name: name.rpartition(".") for name in wanted}
    return {
        name: (f"{prefix}{sgm_name(module, num_blocks)}.{kind}", _as_it_is)
        for name, (module, _, kind) in split.items()
    }


def _open_clip_origin(name: str) -> Origin:
    """OpenCLIP has the three projections of an attention in one, and another one transposed."""
    if name == "text_projection.weight":
        return "text_projection", _transposed
    if (layer := _LAYER.fullmatch(name)) is None:
        return _OPEN_CLIP_ROOT[name], _as_it_is
    number, module, kind = layer.groups()
    block = f"transformer.resblocks.{number}"
    if module in _QKV:
        return f"{block}.attn.in_proj_{kind}", partial(_third, _QKV[module])
    return f"{block}.{_OPEN_CLIP[module]}.{kind}", _as_it_is


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T


def _third(index: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.tensor_split(3)[index]
