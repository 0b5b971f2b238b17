"""How many images share a unit of work: measured, since more are not always faster."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable

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
_ROUNDS = 5


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
    device's memory. A max_batch that does not fit is halved until it does.

    Raises:
        DeviceMemoryError: not even one image fits.
    """
    started = time.perf_counter()
    trial = _Trial(pipeline)
    if max_batch is None:
        steps, decodes = largest_worthwhile(trial.step_s), largest_worthwhile(trial.decode_s)
        limits = BatchLimits(steps, decodes, trial.lane)
    else:
        limits = BatchLimits(_largest_that_fits(trial, max_batch))
    pipeline.compile_no_more()
    log.info("%s, warmed up in %.1f s", limits, time.perf_counter() - started)
    return limits


def _largest_that_fits(trial: _Trial, max_batch: int) -> int:
    """The given batch size, or the half, the quarter, ... of it that fits into memory."""
    if not trial.pipeline.warms_up:
        return max_batch
    trial.step_s(1)
    trial.decode_s(1)
    while max_batch > 1:
        try:
            trial.step_s(max_batch)
            return max_batch
        except DeviceMemoryError as error:
            log.warning("%d images do not share a step (%s): trying half", max_batch, error)
            max_batch //= 2
    return 1


class _Trial:
    """Times units of work of images of the model's own size, whose pixels nobody sees.

    Attributes:
        pipeline: what does them.
        lane: of the images.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._request = GenerationRequest.resolve(pipeline.card, prompt="warm up", seed=0)
        self.lane = Lane(self._request.width, self._request.height, guided=False)
        (self._conditioning,) = pipeline.encode([self._request])
        self._known: set[tuple[Kind, int]] = set()

    def step_s(self, num_images: int) -> float:
        """Seconds of a step."""
        return self._seconds(STEP, num_images, lambda: self.pipeline.step(self._new(num_images)))

    def decode_s(self, num_images: int) -> float:
        """Seconds of a decode."""
        samples = self._new(num_images)
        for sample in samples:
            while not sample.trajectory.done:
                sample.trajectory.advance(sample.trajectory.latents)
        return self._seconds(DECODE, num_images, lambda: self.pipeline.decode(samples))

    def _new(self, num_images: int) -> list[Sample]:
        return [
            self.pipeline.start(self._request, 0, self._conditioning) for _ in range(num_images)
        ]

    def _seconds(self, kind: Kind, num_images: int, run: Callable[[], object]) -> float:
        """Of one run; a shape's first one does not count, unless it took more than a second."""
        first = (kind, num_images) not in self._known
        self._known.add((kind, num_images))
        self.pipeline.mark()()
        started = time.perf_counter()
        run()
        self.pipeline.mark()()
        seconds = time.perf_counter() - started
        return self._seconds(kind, num_images, run) if first and seconds <= _MAX_UNIT_S else seconds


def largest_worthwhile(seconds_of: Callable[[int], float]) -> int:
    """The batch size up to which doubling pays, by the seconds that a batch of a size takes."""
    best = 1
    while 2 * best <= _MAX_IMAGES and _doubling_pays(seconds_of, best):
        best *= 2
    return best


def _doubling_pays(seconds_of: Callable[[int], float], num_images: int) -> bool:
    """By the median of several rounds, in each of which both are timed one after the other.

    What else the machine does slows both, or one of them now and then.
    """
    ratios: list[float] = []
    while len(ratios) < _ROUNDS:
        single = seconds_of(num_images)
        if single > _MAX_UNIT_S:
            return False
        try:
            doubled = seconds_of(2 * num_images)
        except DeviceMemoryError:
            return False
        if doubled > _MAX_UNIT_S:
            return False
        ratios.append(doubled / single)
    return statistics.median(ratios) <= 2 * _WORTHWHILE
