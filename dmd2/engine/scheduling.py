"""Which images run next, and together. No torch: an image here is anything.

Images in one lane may share a unit of work of one kind, whatever their requests and steps. Between
lanes the device's time is shared by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996):
each lane has a virtual time, the work it was given, and the lane that is furthest behind goes next.
A lane that comes alive starts at the present virtual time, so a small image amid large ones waits
for the unit of work in progress, and then overtakes until it has had as much as they.

A lane may have to be made ready first, as by adding LoRAs to the weights. It pays for that, and
goes next only when it is several times as far behind: so lanes that put each other's weights out
of memory take turns of some length, of which making them ready is a part and not the most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from dmd2.request.lane import Lane

# So many times its cost of being made ready a lane has to be behind the others.
_PATIENCE = 4.0


class Schedulable(Protocol):
    """What the scheduler must know of a kind of work."""

    @property
    def goes_first(self) -> bool:
        """Whether it runs before whatever else its lane waits for."""

    @property
    def cost(self) -> Callable[[Lane], float]:
        """Of one image: how long it takes, in pixels that pass the UNet."""


Image = TypeVar("Image")
Kind = TypeVar("Kind", bound=Schedulable)


@dataclass(frozen=True)
class Work(Generic[Image, Kind]):
    """One unit of work for the device; no other begins before it has been given out.

    Attributes:
        kind: what is done with each of the images.
        lane: of all the images.
        images: at least one.
    """

    kind: Kind
    lane: Lane
    images: list[Image]


@dataclass
class _Queue(Generic[Image, Kind]):
    """A lane's images in the order they came, and the virtual time up to which it was served."""

    virtual_time: float
    waiting: dict[Image, Kind] = field(default_factory=dict)


class FairScheduler(Generic[Image, Kind]):
    """The images under way and waiting, by lane, each with the kind of work that it waits for.

    Args:
        kinds: of work, in the order of an image's way.
        max_batch: how many images of a lane may share a unit of work of that kind.
        is_over: whether nobody waits for an image any more.
        ready_cost: what making a lane ready for a unit of work would cost now, as a kind's cost
            is told; 0 where it is ready.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        max_batch: Callable[[Lane, Kind], int],
        is_over: Callable[[Image], bool] = lambda _: False,
        ready_cost: Callable[[Work[Image, Kind]], float] = lambda _work: 0.0,
    ) -> None:
        self._kinds = kinds
        self._max_batch = max_batch
        self._is_over = is_over
        self._ready_cost = ready_cost
        self._queues: dict[Lane, _Queue[Image, Kind]] = {}
        self._now = 0.0

    def __bool__(self) -> bool:
        """Whether there is any work."""
        return any(queue.waiting for queue in self._queues.values())

    def put(self, lane: Lane, image: Image, kind: Kind) -> None:
        """An image waits for that kind of work now; a new one comes last in its lane."""
        queue = self._queues.setdefault(lane, _Queue(self._now))
        if not queue.waiting:
            queue.virtual_time = max(queue.virtual_time, self._now)
        queue.waiting[image] = kind

    def next_work(self) -> Work[Image, Kind] | None:
        """What runs next; its images stay queued until they are put elsewhere or removed.

        Images that are over are dropped before: a lane pays for what is run. None if all were.

        In the lane that is furthest behind, work that goes first. Otherwise, of the images that
        came first, as many as may share a unit of work: those that are behind on their way catch
        up, so that they can go on together. Only for them is an image in progress put off.
        """
        for queue in self._queues.values():
            for image in [image for image in queue.waiting if self._is_over(image)]:
                del queue.waiting[image]
        self._forget_the_idle()
        if not self:
            return None
        queue, work, ready_cost = min(
            self._choices(), key=lambda choice: choice[0].virtual_time + _PATIENCE * choice[-1]
        )
        self._now = max(self._now, queue.virtual_time)
        queue.virtual_time += ready_cost + work.kind.cost(work.lane) * len(work.images)
        return work

    def _choices(self) -> Iterator[tuple[_Queue[Image, Kind], Work[Image, Kind], float]]:
        """What each lane would do next, and what it would cost to make it ready for that."""
        for lane, queue in self._queues.items():
            if queue.waiting:
                kind = self._next_kind(lane, list(queue.waiting.values()))
                alike = [image for image, its_kind in queue.waiting.items() if its_kind is kind]
                work = Work(kind, lane, alike[: self._max_batch(lane, kind)])
                yield queue, work, self._ready_cost(work)

    def _next_kind(self, lane: Lane, waiting: Sequence[Kind]) -> Kind:
        there = [kind for kind in self._kinds if kind in set(waiting)]
        first = next((kind for kind in there if kind.goes_first), None)
        if first is not None:
            return first
        first_images = waiting[: max(self._max_batch(lane, kind) for kind in there)]
        return next(kind for kind in there if kind in first_images)

    def remove(self, lane: Lane, image: Image) -> None:
        """Take out an image that is finished, has failed or is no longer wanted, if it is there."""
        if lane in self._queues:
            self._queues[lane].waiting.pop(image, None)
            self._forget_the_idle()

    def _forget_the_idle(self) -> None:
        """Drop empty lanes that are owed nothing; with no work left at all, time begins anew."""
        if not self:
            self._queues.clear()
            self._now = 0.0
        self._queues = {
            lane: queue
            for lane, queue in self._queues.items()
            if queue.waiting or queue.virtual_time > self._now
        }
