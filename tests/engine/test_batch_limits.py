"""How many images share a unit of work."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

import pytest

from dmd2.engine import batch_limits
from dmd2.engine.batch_limits import BatchLimits, largest_worthwhile, warm_up
from dmd2.engine.units import DECODE, STEP
from dmd2.errors import DeviceMemoryError
from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning
from dmd2.models.device_work import memory_errors
from dmd2.request.lane import Lane
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.sample import Sample

MEGAPIXEL = Lane(1024, 1024, guided=False)
OFF = Tuning("off")


@pytest.mark.parametrize(
    ("fixed_s", "per_image_s", "largest"),
    [
        (0.0, 0.01, 1),  # a device that is full with one image
        (0.008, 0.01, 8),  # 16 would make an image 4.5 % cheaper
        (1.1, 0.01, 1),  # so slow that nobody should wait for company
        (0.95, 0.04, 1),  # as slow with two
        (0.05, 0.001, 16),  # one that waits for its launches
    ],
)
def test_doubling_must_pay(fixed_s: float, per_image_s: float, largest: int) -> None:
    tried = []

    def seconds_of(num_images: int) -> float:
        tried.append(num_images)
        return fixed_s + per_image_s * num_images

    assert largest_worthwhile(seconds_of) == largest
    if fixed_s > 0.9:
        assert len(tried) <= 2, "what lasts longer than a second is not repeated"


def test_more_than_sixteen_are_taken_where_somebody_asked_for_more() -> None:
    limits = BatchLimits(48, 48)
    assert limits(MEGAPIXEL, STEP) == 48
    limits.lower(MEGAPIXEL, STEP, 48)
    assert limits(MEGAPIXEL, STEP) == 24


@pytest.mark.parametrize("slowed", [1, 2])
def test_what_else_the_machine_does_now_and_then_does_not_decide(slowed: int) -> None:
    """Two of the five rounds meet another process, at the single or at the doubled batch."""
    calls: Counter[int] = Counter()

    def seconds_of(num_images: int) -> float:
        calls[num_images] += 1
        is_slowed = (num_images > 1) == (slowed > 1) and calls[num_images] % 5 in (1, 3)
        return (0.05 + 0.001 * num_images) * (4 if is_slowed else 1)

    assert largest_worthwhile(seconds_of) == 16


class Device:
    """Takes so long for a batch, on a clock that only it moves, with a first call for each."""

    def __init__(self, fixed_s: float, per_image_s: float) -> None:
        self.now, self.tried = 0.0, []
        self._fixed_s, self._per_image_s = fixed_s, per_image_s

    def seconds_of(self, num_images: int) -> float:
        seconds = self._fixed_s + self._per_image_s * num_images
        self.now += seconds if num_images in self.tried else 2 * seconds
        self.tried.append(num_images)
        return seconds


@pytest.mark.parametrize(
    ("fixed_s", "per_image_s", "budget_s", "largest"),
    [
        (0.003, 0.02, 0.45, 4),  # two pay; for four there was no time
        (0.003, 0.02, 0.05, 4),  # nothing could be measured: the kind's own number
        (0.01, 0.3, 0.0, 3),  # which has to fit into a second
        (0.1, 0.5, 0.0, 1),
        (0.0, 0.02, 1.5, 1),  # doubling was seen not to pay
        (0.05, 0.001, 60.0, 16),
    ],
)
def test_no_more_is_measured_than_there_is_time_for(
    fixed_s: float, per_image_s: float, budget_s: float, largest: int
) -> None:
    device = Device(fixed_s, per_image_s)
    found = largest_worthwhile(device.seconds_of, lambda: max(0, budget_s - device.now), 4)
    assert found == largest
    owed = 2 * (fixed_s + per_image_s)  # of one image, which setup has to run anyway
    assert device.now <= budget_s + owed


def test_rounds_that_could_change_nothing_are_not_run() -> None:
    device = Device(0.0, 0.02)
    assert largest_worthwhile(device.seconds_of) == 1
    assert device.tried == [1, 2] * 3


def test_ways_and_batches_share_one_budget(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def choose_ways(
        pipeline: Pipeline, request: object, tuning: Tuning, budget: Budget
    ) -> dict[str, float]:
        assert tuning == Tuning("quick")
        while budget.left():
            pass
        return {}

    monkeypatch.setattr(batch_limits, "choose_ways", choose_ways)
    # On a busy machine a second may not hold as many images as are taken unmeasured.
    monkeypatch.setattr(batch_limits, "_MAX_UNIT_S", 60.0)
    with caplog.at_level(logging.INFO, "dmd2.engine.batch_limits"):
        limits = warm_up(pipeline, None, None, Budget(0.01))
    assert limits(MEGAPIXEL, STEP) == 1
    assert limits(Lane(64, 64, guided=False), STEP) == STEP.max_batch
    assert "no time to measure batches of more than 1: 4 are taken" in caplog.text


def test_what_was_seen_to_be_slow_is_not_called_again(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with the real SDXL, where choosing ways has run each part once."""
    tried = small_device(pipeline, monkeypatch, most=16)
    monkeypatch.setattr(batch_limits, "choose_ways", lambda *_: {"step": 30.0, "decode": 60.0})
    assert warm_up(pipeline, None)(MEGAPIXEL, STEP) == 1
    assert tried == []


def test_what_does_not_fit_is_not_taken() -> None:
    def seconds_of(num_images: int) -> float:
        if num_images > 4:
            raise DeviceMemoryError("out of memory")
        return 0.1

    assert largest_worthwhile(seconds_of) == 4


@pytest.mark.parametrize(
    ("lane", "images"),
    [
        (MEGAPIXEL, 4),
        (Lane(1024, 1024, guided=True), 2),
        (Lane(512, 512, guided=False), 16),
        (Lane(256, 256, guided=False), 16),
        (Lane(2048, 1952, guided=False), 1),
        (Lane(2048, 1952, guided=True), 1),
    ],
)
def test_other_sizes_share_as_many_pixels(lane: Lane, images: int) -> None:
    limits = BatchLimits(step=4, decode=1, reference=MEGAPIXEL)
    assert limits(lane, STEP) == images


def test_guidance_makes_no_decode_dearer() -> None:
    limits = BatchLimits(step=4, decode=2, reference=MEGAPIXEL)
    assert limits(Lane(1024, 1024, guided=True), DECODE) == 2


def test_what_did_not_fit_is_lowered_for_its_size_alone() -> None:
    limits = BatchLimits(step=8, decode=2)
    limits.lower(MEGAPIXEL, STEP, 8)
    assert limits(MEGAPIXEL, STEP) == 4
    limits.lower(MEGAPIXEL, STEP, 1)
    assert limits(MEGAPIXEL, STEP) == 1
    assert limits(MEGAPIXEL, DECODE) == 2
    assert limits(Lane(512, 512, guided=False), STEP) == 8


def test_what_did_not_fit_beside_a_lora_may_fit_without() -> None:
    limits = BatchLimits(step=8)
    first, second = (replace(MEGAPIXEL, loras=((sha256, 1.0),)) for sha256 in "ab")
    limits.lower(first, STEP, 8)
    assert (limits(first, STEP), limits(second, STEP), limits(MEGAPIXEL, STEP)) == (4, 4, 8)


def test_they_are_measured_at_the_models_own_size(pipeline: Pipeline) -> None:
    seen = []
    step, decode = pipeline.step, pipeline.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "step", lambda s: (seen.append(("step", len(s))), step(s))[1])
        patch.setattr(pipeline, "decode", lambda s: (seen.append(("decode", len(s))), decode(s))[1])
        limits = warm_up(pipeline, None, OFF, Budget(60))
    own = Lane(64, 64, guided=False)
    for kind in (STEP, DECODE):
        largest = max(number for name, number in seen if name == kind.name)
        assert limits(own, kind) in (largest, largest // 2)
    assert "of 64x64 a step" in str(limits)


def test_one_that_is_given_is_taken(pipeline: Pipeline) -> None:
    assert warm_up(pipeline, 3, OFF)(MEGAPIXEL, STEP) == 3


def small_device(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let a pipeline run out of memory above so many images; how many were tried, in order."""
    step, tried = Pipeline.step, []

    def step_if_it_fits(samples: list[Sample]) -> None:
        tried.append(len(samples))
        if len(samples) > most:
            raise DeviceMemoryError("CUDA out of memory")
        step(pipeline, samples)

    monkeypatch.setattr(pipeline, "step", step_if_it_fits)
    monkeypatch.setattr(Pipeline, "warms_up", True)
    return tried


def test_one_that_is_given_and_does_not_fit_is_halved(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = small_device(pipeline, monkeypatch, most=3)
    assert warm_up(pipeline, 12, OFF)(MEGAPIXEL, STEP) == 3
    assert list(dict.fromkeys(tried)) == [1, 12, 6, 3]


def test_not_even_one_that_fits_is_an_error(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_device(pipeline, monkeypatch, most=0)
    for max_batch in (None, 4):
        with pytest.raises(DeviceMemoryError):
            warm_up(pipeline, max_batch, OFF)


def test_a_trial_that_lasts_long_is_not_repeated(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with the real SDXL, where a step takes half a minute."""
    tried = small_device(pipeline, monkeypatch, most=16)
    monkeypatch.setattr(batch_limits, "_MAX_UNIT_S", 0.0)
    assert warm_up(pipeline, None, OFF)(MEGAPIXEL, STEP) == 1
    assert tried == [1]


@pytest.mark.parametrize("library", ["CUBLAS", "CUDNN"])
def test_what_a_library_cannot_allocate_is_about_memory(library: str, pipeline: Pipeline) -> None:
    @memory_errors
    def fail(said: str) -> None:
        raise RuntimeError(said)

    with pytest.raises(DeviceMemoryError, match=r"ALLOC_FAILED.*DMD2_MEMORY=low"):
        fail(f"{library} error: {library}_STATUS_ALLOC_FAILED when calling `create(handle)`")
    with pytest.raises(RuntimeError, match="NOT_INITIALIZED"):
        fail(f"{library}_STATUS_NOT_INITIALIZED")
