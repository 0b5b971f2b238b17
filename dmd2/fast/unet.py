"""The UNet with split GroupNorms and without divisions by 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dmd2.fast.group_norm import SplitGroupNorm
from dmd2.fast.twin import twin

# diffusers divides by these at the end of a residual block and of an attention.
_DIVISORS = ("output_scale_factor", "rescale_output_factor")


class _NoDivisor:
    """What a tensor is divided by where the divisor is 1: it stays, and nothing is launched."""

    def __rtruediv__(self, dividend: torch.Tensor) -> torch.Tensor:
        return dividend


def lean_unet(unet: Any) -> nn.Module:
    """A UNet to be called as this one is, on the same weights, for inference only.

    All forwards but GroupNorm's are diffusers' own, so that any config is served; of SDXL's
    launches 159 divisions go. unet stays as it was; a change in place of its weights is seen. The
    lean one must not be moved or cast.

    Args:
        unet: diffusers' UNet2DConditionModel.
    """
    lean: nn.Module = twin(unet)
    for module in list(lean.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.GroupNorm:
                setattr(module, name, SplitGroupNorm(child))
        for divisor in _DIVISORS:
            if getattr(module, divisor, None) == 1:
                setattr(module, divisor, _NoDivisor())
    return lean
