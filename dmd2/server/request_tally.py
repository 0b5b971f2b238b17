"""What became of the requests of this process, in numbers."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from dmd2.errors import DeadlineError, InvalidRequestError, UnsafeContentError

# The first that fits tells what became of a request that ended with an error.
_STATUSES: tuple[tuple[type[BaseException], str], ...] = (
    (InvalidRequestError, "refused"),
    (UnsafeContentError, "withheld"),
    (DeadlineError, "timed_out"),
    (asyncio.CancelledError, "canceled"),
    (BaseException, "failed"),
)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Durations:
    """How often something took how long.

    Attributes:
        counts: for each of SECONDS, those that took at most so long and longer than the one before;
            at the end those that took longer than all.
        sum_s: seconds of all together.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """One took so long."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum_s += seconds


class RequestTally:
    """Counts what the event loop's thread tells it; any thread may read. Nothing is locked.

    Attributes:
        by_status: requests that are over; those that Cog's server refused itself are none.
        in_progress: requests that are not.
        durations: of requests that were answered with images.
        stages: the parts of these, by stage.
        images: that were made, of requests whose images were all made.
        flagged: those of them that the safety checker flagged.
        withheld: those of them that did not leave.
    """

    def __init__(self, stages: Sequence[str]) -> None:
        self.by_status = dict.fromkeys(("succeeded", *(status for _, status in _STATUSES)), 0)
        self.in_progress = 0
        self.durations = Durations()
        self.stages = {stage: Durations() for stage in stages}
        self.images = self.flagged = self.withheld = 0

    @contextmanager
    def request(self, num_images: int) -> Iterator[None]:
        """Count a request, whose body of `with` is its way; what that raises passes through."""
        self.in_progress += 1
        try:
            yield
        except BaseException as error:
            self.by_status[next(name for kind, name in _STATUSES if isinstance(error, kind))] += 1
            if isinstance(error, UnsafeContentError):
                self._count(num_images, num_images, num_images)
            raise
        else:
            self.by_status["succeeded"] += 1
        finally:
            self.in_progress -= 1

    def made(
        self, seconds: Mapping[str, float], num_images: int, num_flagged: int, num_withheld: int
    ) -> None:
        """A request has its images; seconds are by stage."""
        for stage, each in seconds.items():
            self.stages[stage].add(each)
        self.durations.add(sum(seconds.values()))
        self._count(num_images, num_flagged, num_withheld)

    def _count(self, num_images: int, num_flagged: int, num_withheld: int) -> None:
        self.images += num_images
        self.flagged += num_flagged
        self.withheld += num_withheld
