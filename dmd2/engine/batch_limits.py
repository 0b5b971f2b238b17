"""How many images share a unit of work: measured, since more are not always faster."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace

from dmd2.engine.units import DECODE, STEP, Kind
from dmd2.errors import DeviceMemoryError
from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning
from dmd2.fast.ways import Part
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lane import Lane
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways
from dmd2.sampling.sample import Sample

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
        self._lowered: dict[tuple[Lane, bool, Kind], int] = {}

    def __call__(self, lane: Lane, kind: Kind) -> int:
        """At least 1."""
        images = self._by_size(lane, kind)
        return min(images, self._lowered.get(_alike(lane, kind), images))

    def lower(self, lane: Lane, kind: Kind, num_images: int) -> None:
        """So many images did not fit into memory: from now on at most half as many."""
        self._lowered[_alike(lane, kind)] = max(1, num_images // 2)

    def _by_size(self, lane: Lane, kind: Kind) -> int:
        images = self._images.get(kind, kind.max_batch)
        if self._reference is None:
            return images
        share = kind.cost(self._reference) / kind.cost(lane)
        return max(1, min(int(images * share), max(images, _MAX_IMAGES)))

    def __str__(self) -> str:
        size = f" of {self._reference.width}x{self._reference.height}" if self._reference else ""
        return f"{self._images[STEP]} images{size} a step, {self._images[DECODE]} a decode"


def _alike(lane: Lane, kind: Kind) -> tuple[Lane, bool, Kind]:
    """The same for lanes that take the same memory.

    There are endlessly many sets of LoRAs; what does not fit beside one may fit without any.
    """
    return replace(lane, loras=()), bool(lane.loras), kind


def warm_up(
    pipeline: Pipeline,
    max_batch: int | None,
    tuning: Tuning | None = None,
    budget: Budget | None = None,
) -> BatchLimits:
    """Make the first calls, so that no request has to; choose ways, and the batch sizes that pay.

    Where max_batch is None, 1, 2, 4, ... images of the model's own size are timed until twice as
    many make an image less than 5 % cheaper, last longer than a second, do not fit into the
    device's memory, or find no time. A max_batch that does not fit is halved until it does.

    Args:
        pipeline: whose models are called.
        max_batch: how many images may share a step; None measures how many pay.
        tuning: which ways are tried; None for the usual.
        budget: for all that is measured; None for the usual seconds.

    Raises:
        DeviceMemoryError: not even one image fits.
    """
    started = time.perf_counter()
    budget = budget or Budget()
    trial = _Trial(pipeline, budget)
    trial.know(choose_ways(pipeline, trial.request, tuning or Tuning(), budget))
    if max_batch is None:
        step = largest_worthwhile(trial.step_s, budget.left, STEP.max_batch)
        decode = largest_worthwhile(trial.decode_s, budget.left, DECODE.max_batch)
        limits = BatchLimits(step, decode, trial.lane)
    else:
        limits = BatchLimits(_largest_that_fits(trial, max_batch))
    pipeline.end_warm_up()
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
        request: for one of the images.
        lane: of the images.
    """

    def __init__(self, pipeline: Pipeline, budget: Budget) -> None:
        self.pipeline = pipeline
        self._budget = budget
        self.request = GenerationRequest.resolve(pipeline.card, prompt="warm up", seed=0)
        self.lane = Lane(self.request.width, self.request.height, guided=False)
        with budget.uncharged():
            (self._conditioning,) = pipeline.encode([self.request])
        self._known_s: dict[tuple[Kind, int], float] = {}

    def know(self, seconds: Mapping[Part, float]) -> None:
        """What one image takes, as it was measured already: what is slow is not called again."""
        kinds: Mapping[Part, Kind] = {"step": STEP, "decode": DECODE}
        for part, one_image_s in seconds.items():
            if one_image_s > _MAX_UNIT_S:
                self._known_s[kinds[part], 1] = one_image_s

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
        return [self.pipeline.start(self.request, 0, self._conditioning) for _ in range(num_images)]

    def _seconds(self, kind: Kind, num_images: int, run: Callable[[], object]) -> float:
        """Of one run; a shape's first one does not count, unless it is slow."""
        key = (kind, num_images)
        if self._known_s.get(key, 0.0) > _MAX_UNIT_S:
            return self._known_s[key]
        if key not in self._known_s:
            # The first request would make one image's first call; compiling takes what it takes.
            owed = num_images == 1 or self.pipeline.compiles
            with self._budget.uncharged() if owed else nullcontext():
                self._known_s[key] = seconds = self._timed(run)
            is_slow = seconds > min(_MAX_UNIT_S, self._budget.left())
            if is_slow and not self.pipeline.compiles:
                return seconds
        self._known_s[key] = seconds = self._timed(run)
        return seconds

    def _timed(self, run: Callable[[], object]) -> float:
        self.pipeline.mark()()
        began = self._budget.now()
        run()
        self.pipeline.mark()()
        return self._budget.now() - began


def largest_worthwhile(
    seconds_of: Callable[[int], float],
    seconds_left: Callable[[], float] = lambda: math.inf,
    unmeasured: int = 1,
) -> int:
    """The batch size up to which doubling pays, by the seconds that a batch of a size takes.

    Args:
        seconds_of: measures it, for a number of images.
        seconds_left: to measure in.
        unmeasured: what is taken where that is not enough, as far as a second holds so many.
    """
    best = 1
    while 2 * best <= _MAX_IMAGES:
        pays, seconds = _doubling_pays(seconds_of, best, seconds_left)
        if pays is None:
            in_a_second = int(_MAX_UNIT_S * best / max(seconds, 1e-9))
            taken = max(best, min(unmeasured, in_a_second))
            log.info("no time to measure batches of more than %d: %d are taken", best, taken)
            return taken
        if not pays:
            return best
        best *= 2
    return best


def _doubling_pays(
    seconds_of: Callable[[int], float], num_images: int, seconds_left: Callable[[], float]
) -> tuple[bool | None, float]:
    """By the median of several rounds, in each of which both are timed one after the other.

    What else the machine does slows both, or one of them now and then. More rounds than settle the
    median of all are not run, nor such as there is no time for: None where not one was. Beside it
    the seconds of the undoubled batch.
    """
    ratios: list[float] = []
    round_s = 0.0
    while not _is_settled(ratios) and round_s <= seconds_left():
        single = seconds_of(num_images)
        if single > _MAX_UNIT_S:
            return False, single
        # Of a new shape there is a first call too.
        if not ratios and 4 * single > seconds_left():
            return None, single
        try:
            doubled = seconds_of(2 * num_images)
        except DeviceMemoryError:
            return False, single
        if doubled > _MAX_UNIT_S:
            return False, single
        ratios.append(doubled / single)
        round_s = single + doubled
    if not ratios:
        return None, math.inf
    return statistics.median(ratios) <= 2 * _WORTHWHILE, single


def _is_settled(ratios: list[float]) -> bool:
    """Whether more rounds, up to _ROUNDS of them, could not change what the median says."""
    num_paying = sum(ratio <= 2 * _WORTHWHILE for ratio in ratios)
    return max(num_paying, len(ratios) - num_paying) > _ROUNDS // 2
