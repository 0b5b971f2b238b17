"""A decoded image on its way to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dmd2.models.device_work import Mark


@dataclass(frozen=True)
class Picture:
    """A decoded image on its way to the host.

    Attributes:
        decoded: waits for its decode, and says when that had ended.
        checked: whether it is classified.
    """

    decoded: Mark
    checked: bool
    _pixels: torch.Tensor
    _is_finite: torch.Tensor
    _nsfw_score: torch.Tensor
    _wait: Mark
    _decode_again: Callable[[], tuple[torch.Tensor, torch.Tensor]]

    def pixels(self) -> NDArray[np.uint8]:
        """The pixels of result alone."""
        return self.result()[0]

    def result(self) -> tuple[NDArray[np.uint8], float | None]:
        """Wait for it: uint8 [H, W, 3], and the probability of "nsfw", None where not checked.

        A decode that was not finite is done again in float32. A score may be NaN.

        Raises:
            GenerationError: the latents, or even the float32 decode, are not finite.
        """
        self._wait()
        pixels, nsfw_score = self._pixels, self._nsfw_score
        if not self._is_finite:
            pixels, nsfw_score = self._decode_again()
        return pixels.numpy(), float(nsfw_score) if self.checked else None
