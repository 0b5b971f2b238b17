"""How many engines a gateway has before it, and what each of them takes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dmd2.errors import DMD2Error

MAX_ENGINES = 1024
_COUNT = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


@dataclass(frozen=True)
class Fleet:
    """Engines of one model, each in a process of its own.

    Attributes:
        min_engines, max_engines: between which their number follows the work under way.
        num_gpus, num_cpus: that each has for itself.
        upscale_delay_s, downscale_delay_s: how long there is too much work, or too little, before
            their number changes; a model takes a while to load.
    """

    min_engines: int
    max_engines: int
    num_gpus: int = 0
    num_cpus: int = 1
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 600.0

    @classmethod
    def of(cls, text: str) -> Fleet:
        """A fleet of "N" engines, or of "MIN-MAX".

        Raises:
            DMD2Error: it is neither.
        """
        found = _COUNT.fullmatch(text)
        first, last = (int(number or 0) for number in found.groups()) if found else (0, 0)
        last = last or first
        if not 1 <= first <= last <= MAX_ENGINES:
            raise DMD2Error(
                f"--engines {text}: give a number from 1 to {MAX_ENGINES}, or two of them as "
                "MIN-MAX, such as 1-4"
            )
        return cls(first, last)
