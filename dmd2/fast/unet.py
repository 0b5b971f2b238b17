"""The UNet with split GroupNorms and without divisions by 1."""

from __future__ import annotations

from typing import Any

from torch import nn

from dmd2.fast.group_norm import SplitGroupNorm
from dmd2.fast.twin import drop_divisions, replace, twin


def lean_unet(unet: Any) -> nn.Module:
    """A UNet to be called as this one is, on the same weights, for inference only.

    All forwards but GroupNorm's are diffusers' own, so that any config is served. unet stays as
    it was; a change in place of its weights is seen. The lean one must not be moved or cast.

    Args:
        unet: diffusers' UNet2DConditionModel.
    """
    lean: nn.Module = twin(unet)
    replace(lean, nn.GroupNorm, SplitGroupNorm)
    drop_divisions(lean)
    return lean
