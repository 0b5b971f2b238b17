"""Which images run next, and together. No torch: an image here is anything.

Images in one lane may share a UNet call, whatever their requests and steps. Between lanes the
device's time is shared by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): each
lane has a virtual time, the work it was given, and the lane that is furthest behind goes next. A
lane that comes alive starts at the present virtual time, so a small image amid large ones waits
for the unit of work in progress, and then overtakes until it has had as much as they.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

Image = TypeVar("Image")

# A VAE decode costs about 1.5 UNet evaluations: 10.5 against 6.8 TFLOP for SDXL at 1024x1024.
_DECODE_COST = 1.5


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
    def step_cost(self) -> float:
        """Of one image's step, in pixels that pass the UNet."""
        return self.width * self.height * (2.0 if self.guided else 1.0)

    @property
    def decode_cost(self) -> float:
        """Of one image's decode, in the same unit."""
        return self.width * self.height * _DECODE_COST


@dataclass(frozen=True)
class Work(Generic[Image]):
    """One unit of work for the device; no other begins before it has been given out.

    Attributes:
        kind: "step" takes each image one step further, "decode" turns each into pixels.
        lane: of all the images.
        images: at least one.
    """

    kind: Literal["step", "decode"]
    lane: Lane
    images: list[Image]


@dataclass
class _Queue(Generic[Image]):
    """A lane's images in the order they came, and the virtual time up to which it was served."""

    virtual_time: float
    sampling: list[Image] = field(default_factory=list)
    decoding: list[Image] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.sampling or self.decoding)


class FairScheduler(Generic[Image]):
    """The images under way and waiting, by lane.

    Args:
        max_batch: how many images of a lane may share a unit of work of that kind.
    """

    def __init__(self, max_batch: Callable[[Lane, Literal["step", "decode"]], int]) -> None:
        self._max_batch = max_batch
        self._queues: dict[Lane, _Queue[Image]] = {}
        self._now = 0.0

    def __bool__(self) -> bool:
        """Whether there is any work."""
        return any(self._queues.values())

    def add(self, lane: Lane, images: Sequence[Image]) -> None:
        """Queue images for their steps."""
        queue = self._queues.setdefault(lane, _Queue(self._now))
        if not queue:
            queue.virtual_time = max(queue.virtual_time, self._now)
        queue.sampling.extend(images)

    def next_work(self) -> Work[Image]:
        """What runs next; its images stay queued until they are sampled or removed.

        In the lane that is furthest behind, what is sampled is decoded first, and otherwise the
        images that came first take their next step: an image in progress is never put off for
        one that came later.
        """
        lane, queue = min(
            ((lane, queue) for lane, queue in self._queues.items() if queue),
            key=lambda item: item[1].virtual_time,
        )
        self._now = queue.virtual_time
        kind: Literal["step", "decode"] = "decode" if queue.decoding else "step"
        waiting = queue.decoding or queue.sampling
        images = waiting[: self._max_batch(lane, kind)]
        cost = lane.decode_cost if kind == "decode" else lane.step_cost
        queue.virtual_time += cost * len(images)
        return Work(kind, lane, images)

    def sampled(self, lane: Lane, image: Image) -> None:
        """An image has taken its last step, and is to be decoded."""
        queue = self._queues[lane]
        queue.sampling.remove(image)
        queue.decoding.append(image)

    def remove(self, lane: Lane, image: Image) -> None:
        """Take out an image that is finished, has failed or is no longer wanted, if it is there."""
        queue = self._queues.get(lane)
        if queue is None:
            return
        for waiting in (queue.sampling, queue.decoding):
            if image in waiting:
                waiting.remove(image)
        self._forget_the_idle()

    def _forget_the_idle(self) -> None:
        """Drop empty lanes that are owed nothing; with no work left at all, time begins anew."""
        if not self:
            self._queues.clear()
            self._now = 0.0
        self._queues = {
            lane: queue
            for lane, queue in self._queues.items()
            if queue or queue.virtual_time > self._now
        }
