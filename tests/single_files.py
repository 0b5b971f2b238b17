"""SDXL checkpoints in the layout of Stability's own code, as their users have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dmd2.loras.names import MODEL_PARTS, blocks_per_level, sgm_name
from dmd2.settings import ROOT

Tensors = dict[str, torch.Tensor]
Weights = dict[str, Tensors]

DEMO = ROOT / "weights" / "demo"
UNET = "model.diffusion_model."
CLIP_L = "conditioner.embedders.0.transformer."
OPEN_CLIP = "conditioner.embedders.1.model."
TEACHER = {
    "unet": "variants/teacher-unet.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
# What every reader passes over, and what is replaced.
EXTRA = {
    f"{OPEN_CLIP}logit_scale": torch.tensor(4.6),
    f"{CLIP_L}text_model.embeddings.position_ids": torch.arange(77)[None],
    "model_ema.decay": torch.tensor(0.9999),
    "first_stage_model.decoder.conv_in.bias": torch.ones(4),
}


def teacher_weights() -> Weights:
    """The demo's teacher, changed a little, so that no file that is shipped could stand for it."""
    generator = torch.Generator().manual_seed(11)
    weights: Weights = {part: {} for part in MODEL_PARTS}
    for part, path in TEACHER.items():
        for key, tensor in sorted(load_file(DEMO / path).items()):
            noise = torch.randn(tensor.shape, generator=generator)
            weights[part][key] = tensor.float() * (1 + noise / 500)
    weights["text_encoder"] = with_prefix(weights["text_encoder"])
    return weights


def with_prefix(encoder: Tensors) -> Tensors:
    """The first text encoder by the names of SDXL's files: transformers drops text_model."""
    return {f"text_model.{key.removeprefix('text_model.')}": t for key, t in encoder.items()}


def single_file(weights: Weights) -> Tensors:
    """The tensors of a file that has all parts."""
    unet = weights["unet"]
    split = {name: name.rpartition(".") for name in unet}
    blocks = blocks_per_level(unet)
    tensors = {
        f"{UNET}{sgm_name(module, blocks)}.{kind}": unet[name]
        for name, (module, _, kind) in split.items()
    }
    tensors |= {f"{CLIP_L}{name}": tensor for name, tensor in weights["text_encoder"].items()}
    return tensors | _open_clip(weights["text_encoder_2"]) | EXTRA


def write(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    """Write a file, and return its path."""
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(whole, path, {"format": "pt", **metadata})
    return path


def _open_clip(encoder: Tensors) -> Tensors:
    """The second text encoder, by the names of OpenCLIP's own code."""
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_model.encoder.layers": "transformer.resblocks",
        "layer_norm": "ln_",
        "fc1": "c_fc",
        "fc2": "c_proj",
        "self_attn.out_proj": "attn.out_proj",
        "text_projection.weight": "text_projection",
    }
    tensors: Tensors = {}
    for name, tensor in encoder.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            three = [encoder[name.replace(".q_proj.", f".{each}_proj.")] for each in "qkv"]
            tensor = torch.cat(three)
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[OPEN_CLIP + name] = tensor.T if name == "text_projection" else tensor
    return tensors
