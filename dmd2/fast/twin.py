"""A second module tree on a model's own weights, and what is changed in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)
# diffusers divides by these at the end of a residual block and of an attention.
_DIVISORS = ("output_scale_factor", "rescale_output_factor")


class _NoDivisor:
    """What a tensor is divided by where the divisor is 1: it stays, and nothing is launched."""

    def __rtruediv__(self, dividend: torch.Tensor) -> torch.Tensor:
        return dividend


def twin(model: Any) -> Any:
    """A copy of the modules that shares every parameter and buffer by reference.

    What is changed in place in the model's weights is seen by the twin. It must not be moved or
    cast: that would change the model's weights too.
    """
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def replace(model: nn.Module, kind: type[Kind], make: Callable[[Kind], nn.Module]) -> None:
    """Put make(module) in the place of each module of exactly this kind below model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, make(child))


def drop_divisions(model: nn.Module) -> None:
    """Take away the divisions by 1: SDXL's UNet has 159 of them, its decoder 15."""
    for module in model.modules():
        for name in _DIVISORS:
            if getattr(module, name, None) == 1:
                setattr(module, name, _NoDivisor())
