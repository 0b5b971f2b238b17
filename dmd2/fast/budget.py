"""The seconds that setup may spend on finding out what is fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# All that is measured at setup has to fit into this. By the first run on an H200, SDXL's ways take
# about 1.8 s there: 0.4 for plain, 0.2 for the decode's and 1.2 for the step's graphs. A host that
# launches more slowly needs them most, and takes longer; what is left is for the batch sizes.
SETUP_S = 2.5


class Budget:
    """What is left of so many seconds, which begin now.

    Args:
        seconds: in all.
        now: the clock, in seconds.

    Attributes:
        now: the clock that all is measured by.
    """

    def __init__(
        self, seconds: float = SETUP_S, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.now = now
        self._end = now() + seconds

    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self._end - self.now())

    @contextmanager
    def uncharged(self) -> Iterator[None]:
        """What is done in here would be done at setup anyway."""
        began = self.now()
        try:
            yield
        finally:
            self._end += self.now() - began
