"""How many images share a unit of work: measured, since more are not always faster."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from dmd2.engine.units import DECODE, STEP, Kind
from dmd2.errors import DeviceMemoryError
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lane import Lane
from dmd2.sampling.pipeline import Pipeline, Sample

log = logging.getLogger(__name__)

# A larger batch has to make an image this much cheaper: whoever comes in waits for the batch.
_WORTHWHILE = 0.95
_MAX_IMAGES = 16
_MAX_UNIT_S = 1.0
_TIMES = 3


class BatchLimits:
    """The most images of a lane that share a unit of work.

    Args:
        step, decode: so many images of the reference's size; smaller ones may be as many as
            have the same pixels together, up to 16.
        reference: a lane; None takes step and decode for images of any size.

    Other kinds of work take their own max_batch in place of step and decode.
    """

    def __init__(
        self,
        step: int = STEP.max_batch,
        decode: int = DECODE.max_batch,
        reference: Lane | None = None,
    ) -> None:
        self._images = {STEP: step, DECODE: decode}
        self._reference = reference
        self._lowered: dict[tuple[Lane, Kind], int] = {}

    def __call__(self, lane: Lane, kind: Kind) -> int:
        """At least 1."""
        return min(self._by_size(lane, kind), self._lowered.get((lane, kind), _MAX_IMAGES))

    def lower(self, lane: Lane, kind: Kind, num_images: int) -> None:
        """So many images did not fit into memory: from now on at most half as many."""
        self._lowered[lane, kind] = max(1, num_images // 2)

    def _by_size(self, lane: Lane, kind: Kind) -> int:
        images = self._images.get(kind, kind.max_batch)
        if self._reference is None:
            return images
        share = kind.cost(self._reference) / kind.cost(lane)
        return max(1, min(int(images * share), max(images, _MAX_IMAGES)))

    def __str__(self) -> str:
        size = f" of {self._reference.width}x{self._reference.height}" if self._reference else ""
        return f"{self._images[STEP]} images{size} a step, {self._images[DECODE]} a decode"


def warm_up(pipeline: Pipeline, max_batch: int | None) -> BatchLimits:
    """Make the first calls, so that no request has to, and find the batch sizes that pay.

    Where max_batch is None, 1, 2, 4, ... images of the model's own size are timed until twice as
    many make an image less than 5 % cheaper, last longer than a second, or do not fit into the
    device's memory.
    """
    started = time.perf_counter()
    trial = _Trial(pipeline)
    if max_batch is not None:
        if pipeline.warms_up:
            for num_images in sorted({1, max_batch}):
                trial.step_s(num_images)
            trial.decode_s(1)
        limits = BatchLimits(max_batch)
    else:
        steps, decodes = largest_worthwhile(trial.step_s), largest_worthwhile(trial.decode_s)
        limits = BatchLimits(steps, decodes, trial.lane)
    pipeline.compile_no_more()
    log.info("%s, warmed up in %.1f s", limits, time.perf_counter() - started)
    return limits


class _Trial:
    """Times units of work of images of the model's own size."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._request = GenerationRequest.resolve(pipeline.card, prompt="warm up", seed=0)
        self.lane = Lane(self._request.width, self._request.height, guided=False)
        (self._conditioning,) = pipeline.encode([self._request])
        self._finished: list[Sample] = []

    def step_s(self, num_images: int) -> float:
        """Seconds of a step; the first call of a shape does not count."""
        seconds: list[float] = []
        while len(seconds) < _TIMES:
            samples = [self._start() for _ in range(num_images)]
            for _ in self._request.timesteps:
                seconds.append(self._seconds(partial(self._pipeline.step, samples)))
        self._finished = samples
        return min(seconds)

    def decode_s(self, num_images: int) -> float:
        """Seconds of a decode, likewise; step_s comes before."""
        samples = (self._finished * num_images)[:num_images]
        return min(self._seconds(partial(self._pipeline.decode, samples)) for _ in range(_TIMES))

    def _start(self) -> Sample:
        return self._pipeline.start(self._request, 0, self._conditioning)

    def _seconds(self, run: Callable[[], object]) -> float:
        self._pipeline.mark()()
        started = time.perf_counter()
        run()
        self._pipeline.mark()()
        return time.perf_counter() - started


def largest_worthwhile(seconds_of: Callable[[int], float]) -> int:
    """The batch size up to which doubling pays, by the seconds that a batch of a size takes."""
    best, seconds = 1, seconds_of(1)
    while 2 * best <= _MAX_IMAGES and seconds <= _MAX_UNIT_S:
        try:
            doubled = seconds_of(2 * best)
        except DeviceMemoryError:
            break
        if doubled > 2 * seconds * _WORTHWHILE or doubled > _MAX_UNIT_S:
            break
        best, seconds = 2 * best, doubled
    return best
