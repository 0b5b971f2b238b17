"""What images must have in common to run together."""

from __future__ import annotations

from dataclasses import dataclass

from dmd2.request.lora_rules import LoraKey


@dataclass(frozen=True)
class Lane:
    """What images must have in common to share a UNet call.

    Attributes:
        width, height: in pixels.
        guided: whether each takes two UNet evaluations for a step.
        loras: the LoRAs that are added to the weights.
    """

    width: int
    height: int
    guided: bool
    loras: LoraKey = ()

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.width * self.height
