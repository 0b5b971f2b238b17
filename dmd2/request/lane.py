"""What images must have in common to run together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lane:
    """What images must have in common to share a UNet call.

    Attributes:
        width, height: in pixels.
        guided: whether each takes two UNet evaluations for a step.
    """

    width: int
    height: int
    guided: bool

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.width * self.height
