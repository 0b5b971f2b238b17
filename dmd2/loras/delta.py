"""Merging a LoRA in kohya's layout into the weights of a UNet, once and in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from dmd2.errors import ModelError

_PREFIX = "lora_unet_"
_PARTS = (".lora_down.weight", ".lora_up.weight", ".alpha")


def merge(
    weights: Mapping[str, torch.Tensor],
    lora: Mapping[str, torch.Tensor],
    scale: float,
    num_modules: int,
) -> dict[str, torch.Tensor]:
    """The UNet's weights with the LoRA added: W + scale * (alpha / rank) * up @ down.

    The formula is LoRA's (arXiv 2106.09685, section 4.1) with kohya's per-module alpha; a
    convolution's down has the kernel and its up is 1x1.

    Args:
        weights: a UNet's state dict by diffusers' names, any float dtype.
        lora: three tensors a module, named lora_unet_ + the module's name with "_" for "."
            + .lora_down.weight [rank, in, ...], .lora_up.weight [out, rank, ...] and .alpha [].
        scale: the strength, 1.0 for all of it.
        num_modules: how many modules the LoRA must have.

    Returns:
        A new state dict in the dtypes of weights.

    Raises:
        ModelError: a module is incomplete, unknown to the UNet, misshapen, or not one of
            num_modules.
    """
    modules = _module_names(lora)
    if len(modules) != num_modules:
        raise ModelError(f"the LoRA has {len(modules)} modules, and must have {num_modules}")
    names = {
        _PREFIX + key.removesuffix(".weight").replace(".", "_"): key
        for key in weights
        if key.endswith(".weight")
    }
    unknown = sorted(modules - set(names))
    if unknown:
        raise ModelError(f"the UNet has no {unknown[0]} ({len(unknown)} unknown LoRA modules)")
    merged = dict(weights)
    for module in modules:
        key = names[module]
        down, up, alpha = (_part(lora, module + part) for part in _PARTS)
        if not _fits(up, down, weights[key]):
            raise ModelError(
                f"{module} has up {list(up.shape)} and down {list(down.shape)}; the UNet's {key} "
                f"has {list(weights[key].shape)}"
            )
        change = scale * (alpha / down.shape[0]) * _product(up, down)
        merged[key] = (weights[key].float() + change).to(weights[key].dtype)
    return merged


def _module_names(keys: Iterable[str]) -> set[str]:
    modules = set()
    for key in keys:
        part = next((part for part in _PARTS if key.endswith(part)), None)
        if part is None or not key.startswith(_PREFIX):
            raise ModelError(f"{key!r} is not a key of a UNet LoRA in kohya's layout")
        modules.add(key.removesuffix(part))
    return modules


def _part(lora: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    if key not in lora:
        raise ModelError(f"the LoRA lacks {key}, without which its strength is unknown")
    return lora[key].float()


def _fits(up: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether up and down share a rank and have the weight's shape around it."""
    if weight.ndim < 2:
        return False
    rank, (num_out, num_in, *kernel) = down.shape[:1], weight.shape
    flat = [1] * len(kernel)
    return [*down.shape] == [*rank, num_in, *kernel] and [*up.shape] == [num_out, *rank, *flat]


def _product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The product up @ down: matrices, or [out, rank, 1, 1] with [rank, in, h, w]."""
    flat = up.flatten(1) @ down.flatten(1)
    return flat.reshape(up.shape[0], *down.shape[1:])
