"""What is distilled: a copy of the teacher, all of whose weights move, or a LoRA upon it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dmd2.store.saving import save_weights
from training.config import DistillConfig

_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


def as_student(unet: Any, config: DistillConfig) -> Any:
    """A UNet all of whose weights are trained, or with a LoRA beside them if the config says so."""
    if config.lora_rank is None:
        return unet.requires_grad_(True)
    add_lora(unet, config.lora_rank, config.lora_alpha, config.seed)
    return unet


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def add_lora(unet: Any, rank: int, alpha: float, seed: int) -> None:
    """Freeze a UNet and put a trainable LoRA beside each of its blocks' layers, in place.

    These are the modules of DMD2's SDXL LoRA, 788 there: every linear layer and convolution of
    the blocks, resampling and timestep projections included; not what stands before and after.

    Args:
        unet: a UNet2DConditionModel.
        rank: of every module.
        alpha: the LoRA is scaled by alpha / rank.
        seed: of its start; at first the LoRA changes nothing.
    """
    unet.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=lora_modules(unet)))


def lora_modules(unet: nn.Module) -> list[str]:
    """The names of the modules that DMD2's LoRA reaches."""
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.startswith(_BLOCKS)
    ]


def write_lora(unet: Any, path: Path, dtype: torch.dtype = torch.float16) -> int:
    """Write a UNet's LoRA in kohya's layout; returns how many modules it has.

    Three tensors a module, named lora_unet_ + the module's name with "_" for ".":
    .lora_down.weight [rank, in, ...], .lora_up.weight [out, rank, ...] and .alpha [].
    """
    tensors: dict[str, torch.Tensor] = {}
    layers = [(n, m) for n, m in unet.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        key = "lora_unet_" + name.replace(".", "_")
        (adapter,) = layer.active_adapters
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        tensors[f"{key}.lora_down.weight"] = down.detach().to("cpu", dtype).contiguous()
        tensors[f"{key}.lora_up.weight"] = up.detach().to("cpu", dtype).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(layer.lora_alpha[adapter]), dtype=dtype)
    save_weights(tensors, path)
    return len(layers)
