"""What a half-precision model would return if nothing were rounded."""

from __future__ import annotations

import copy
from typing import Any

import torch


class InFloat32:
    """A float32 copy of a UNet or VAE, for calls that were made for the original.

    Args:
        plain: the original, which stays as it is.
    """

    def __init__(self, plain: Any) -> None:
        self._model = copy.deepcopy(plain).float()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the copy returns, of the same arguments in float32."""
        return self._model(*map(widened, arguments), **{k: widened(v) for k, v in named.items()})

    def __getattr__(self, name: str) -> Any:
        """The copy's own: decode, config, dtype."""
        return getattr(self._model, name)


def widened(value: Any) -> Any:
    """float32 in place of any half precision, within a dict too."""
    if isinstance(value, dict):
        return {key: widened(each) for key, each in value.items()}
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_floating else value
