"""How many images share a unit of work."""

from __future__ import annotations

import pytest

from dmd2.engine.batch_limits import BatchLimits, largest_worthwhile, warm_up
from dmd2.engine.units import DECODE, STEP
from dmd2.errors import DeviceMemoryError
from dmd2.request.lane import Lane
from dmd2.sampling.pipeline import Pipeline

MEGAPIXEL = Lane(1024, 1024, guided=False)


@pytest.mark.parametrize(
    ("fixed_s", "per_image_s", "largest"),
    [
        (0.0, 0.01, 1),  # a device that is full with one image
        (0.008, 0.01, 8),  # 16 would make an image 4.5 % cheaper
        (1.0, 0.01, 1),  # so slow that nobody should wait for company
        (0.05, 0.001, 16),  # one that waits for its launches
    ],
)
def test_doubling_must_pay(fixed_s: float, per_image_s: float, largest: int) -> None:
    tried = []

    def seconds_of(num_images: int) -> float:
        tried.append(num_images)
        return fixed_s + per_image_s * num_images

    assert largest_worthwhile(seconds_of) == largest
    assert tried == [2**n for n in range(len(tried))]


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


def test_they_are_measured_at_the_models_own_size(pipeline: Pipeline) -> None:
    seen = []
    step, decode = pipeline.step, pipeline.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "step", lambda s: (seen.append(("step", len(s))), step(s))[1])
        patch.setattr(pipeline, "decode", lambda s: (seen.append(("decode", len(s))), decode(s))[1])
        limits = warm_up(pipeline, None)
    own = Lane(64, 64, guided=False)
    for kind in (STEP, DECODE):
        largest = max(number for name, number in seen if name == kind.name)
        assert limits(own, kind) in (largest, largest // 2)
    assert "of 64x64 a step" in str(limits)


def test_one_that_is_given_is_taken(pipeline: Pipeline) -> None:
    assert warm_up(pipeline, 3)(MEGAPIXEL, STEP) == 3
