"""Kinds of work: a further one is a row and a function."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folders import pixels_of

from dmd2.engine.engine import Engine
from dmd2.engine.job import JobImage
from dmd2.engine.units import KINDS, Finish, Kind
from dmd2.errors import DeviceMemoryError
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline


def request(engine: Engine, **inputs: Any) -> GenerationRequest:
    return GenerationRequest.resolve(engine.card, **{"prompt": "a red circle", "seed": 7} | inputs)


class Passed:
    """A kind of work that notes whom it was run for, and how far each had come."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.finished: list[int] = []
        self.steps_before: dict[JobImage, list[int | None]] = {}
        self.let = threading.Event()
        self.let.set()

    def timestep(self, image: JobImage) -> int | None:
        """The next one of an image, None for pure noise."""
        return image.sample and image.sample.trajectory.timestep

    def run(self, pipeline: Pipeline, images: Sequence[JobImage]) -> Finish:
        assert self.let.wait(timeout=20)
        self.batches.append([image.job.request.seed for image in images])
        for image in images:
            self.steps_before.setdefault(image, []).append(self.timestep(image))

        def finish(image: JobImage) -> None:
            self.finished.append(image.job.request.seed)

        return finish

    def is_due_once(self, image: JobImage) -> bool:
        return image not in self.steps_before

    def is_due_at_every_step(self, image: JobImage) -> bool:
        is_new = image.sample is None or not image.sample.trajectory.done
        seen = self.steps_before.get(image, [])
        return is_new and (not seen or seen[-1] != self.timestep(image))


def engine_with(pipeline: Pipeline, outputs: Path, kind: Kind) -> Engine:
    return Engine(pipeline, outputs, kinds=(kind, *KINDS))


def pixels(engine: Engine, **inputs: Any) -> Any:
    return pixels_of(engine.submit(request(engine, **inputs)).result(timeout=30).paths[0])


def test_one_that_comes_first_is_passed_once_before_any_step(
    engine: Engine, pipeline: Pipeline, tmp_path: Path
) -> None:
    passed = Passed()
    kind = Kind("prepare", passed.is_due_once, passed.run, lambda lane: lane.pixels, max_batch=2)
    longer = engine_with(pipeline, tmp_path, kind)
    passed.let.clear()
    futures = [longer.submit(request(longer, seed=seed)) for seed in range(5)]
    passed.let.set()
    paths = [future.result(timeout=30).paths[0] for future in futures]
    assert sorted(seed for batch in passed.batches for seed in batch) == list(range(5))
    assert sorted(passed.finished) == list(range(5))
    assert max(map(len, passed.batches)) == 2, "its own limit"
    assert all(steps == [None] for steps in passed.steps_before.values())
    for seed, path in enumerate(paths):
        assert np.abs(pixels_of(path) - pixels(engine, seed=seed)).max() <= 1
    longer.close()


def test_one_may_come_before_every_step(engine: Engine, pipeline: Pipeline, tmp_path: Path) -> None:
    passed = Passed()
    kind = Kind("look", passed.is_due_at_every_step, passed.run, lambda lane: 1.0, max_batch=4)
    longer = engine_with(pipeline, tmp_path, kind)
    assert np.abs(pixels(longer) - pixels(engine)).max() <= 1
    assert list(passed.steps_before.values()) == [[None, 749, 499, 249]]
    longer.close()


@pytest.mark.parametrize("error", [RuntimeError("a kernel broke"), DeviceMemoryError("full")])
def test_what_fails_in_it_for_several_is_tried_for_each(
    error: Exception, pipeline: Pipeline, tmp_path: Path
) -> None:
    passed = Passed()

    def run(pipeline: Pipeline, images: Sequence[JobImage]) -> Finish:
        if len(images) > 1 or images[0].job.request.seed == 1:
            raise error
        return passed.run(pipeline, images)

    kind = Kind("prepare", passed.is_due_once, run, lambda lane: lane.pixels, max_batch=4)
    engine = engine_with(pipeline, tmp_path, kind)
    futures = [engine.submit(request(engine, seed=seed)) for seed in (0, 1, 2)]
    assert [future.exception(timeout=30) for future in futures] == [None, error, None]
    engine.close()
