"""What the engine has to do and has done, in numbers: for whoever watches it from outside."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from dmd2.engine.job import Job
from dmd2.models import device_work

_LOOK_AT_MEMORY_S = 1.0


class EngineTally:
    """Numbers that any thread may read at any time.

    Nothing in here is locked, so that whoever reads keeps nobody waiting: what threads share is
    changed by single operations of the interpreter, and copied by such. Only the engine's own
    thread counts units and looks at memory.

    Args:
        kinds: of work, by name.
        device: that does it.
    """

    def __init__(self, kinds: Sequence[str], device: torch.device) -> None:
        self._queued: dict[str, int] = {}
        self._units: dict[str, dict[int, int]] = {kind: {} for kind in kinds}
        self._unit_began: float | None = None
        self._device = device
        self._memory: tuple[int, int] | None = None
        self._looked_at_memory = -math.inf

    def queued(self, job: Job) -> None:
        """A new job's images wait for the first step of one of them."""
        name = job.name
        self._queued[name] = job.request.num_outputs
        job.started.add_done_callback(lambda _: self.left_queue(name))

    def left_queue(self, name: str) -> None:
        """They do no more: one has begun, or nobody waits for them."""
        self._queued.pop(name, None)

    def unit_begins(self) -> None:
        """The device is given its next work."""
        self._unit_began = time.monotonic()

    def unit_ends(self) -> None:
        """The device has done what has to be done before it is given more."""
        self._unit_began = None

    def unit_done(self, kind: str, num_images: int) -> None:
        """A unit of work was done for so many images."""
        counts = self._units[kind]
        counts[num_images] = counts.get(num_images, 0) + 1

    def look_at_memory(self) -> None:
        """Note the device's memory, about once a second.

        The engine's thread does this: torch's allocator has a lock, which whoever reads from
        another thread would hold up, and be held up by.
        """
        now = time.monotonic()
        if now - self._looked_at_memory > _LOOK_AT_MEMORY_S:
            self._memory, self._looked_at_memory = device_work.memory_use(self._device), now

    def images_queued(self) -> int:
        """Images of requests that wait for the first step of one of theirs."""
        return sum(list(self._queued.values()))

    def unit_age_s(self) -> float:
        """How long the device has been at its unit of work; 0 where it has none."""
        began = self._unit_began
        return 0.0 if began is None else time.monotonic() - began

    def images_of_units(self) -> dict[str, dict[int, int]]:
        """For each kind, how many units of work were done for how many images."""
        return {kind: dict(counts) for kind, counts in self._units.items()}

    def memory(self) -> tuple[int, int] | None:
        """Bytes that torch holds of the device's memory, and all that it has; None without CUDA."""
        return self._memory
