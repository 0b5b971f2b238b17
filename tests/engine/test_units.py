"""Kinds of work: a further one is a row and a function."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import pixels_of

from dmd2.engine.batch_limits import BatchLimits
from dmd2.engine.deadlines import Deadlines
from dmd2.engine.engine import Engine
from dmd2.engine.job import Job, JobImage
from dmd2.engine.units import DECODE, KINDS, STEP, Finish, Kind
from dmd2.errors import DeviceMemoryError
from dmd2.models import vae
from dmd2.models.device_work import Mark
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lane import Lane
from dmd2.sampling.pipeline import Pipeline


def request(engine: Engine, **inputs: Any) -> GenerationRequest:
    return GenerationRequest.resolve(engine.card, **{"prompt": "a red circle", "seed": 7} | inputs)


class Passed:
    """A kind of work that notes whom it was run for, and how far each had come."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.finished: list[int] = []
        self.steps_before: dict[JobImage, list[int | None]] = {}
        self.reached, self.let = threading.Event(), threading.Event()
        self.let.set()

    def timestep(self, image: JobImage) -> int | None:
        """The next one of an image, None for pure noise."""
        return image.sample and image.sample.trajectory.timestep

    def run(self, pipeline: Pipeline, images: Sequence[JobImage]) -> Finish:
        self.reached.set()
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


def submit_together(engine: Engine, passed: Passed, seeds: Sequence[int]) -> list[Future[Any]]:
    """Requests that the engine finds at once, behind one of another size."""
    passed.let.clear()
    blocker = engine.submit(request(engine, seed=99, width=128, height=64))
    assert passed.reached.wait(timeout=20)
    futures = [engine.submit(request(engine, seed=seed)) for seed in seeds]
    passed.let.set()
    blocker.result(timeout=30)
    passed.steps_before = {i: s for i, s in passed.steps_before.items() if i.job.lane.width == 64}
    return futures


@pytest.mark.parametrize("max_batch", [1, 2])
def test_one_that_comes_first_is_passed_once_and_all_step_together(
    max_batch: int, engine: Engine, pipeline: Pipeline, tmp_path: Path
) -> None:
    passed = Passed()
    kind = Kind("prepare", passed.is_due_once, passed.run, lambda lane: lane.pixels, max_batch)
    longer = engine_with(pipeline, tmp_path, kind)
    results = [f.result(timeout=30) for f in submit_together(longer, passed, range(4))]
    assert sorted(seed for batch in passed.batches for seed in batch) == [0, 1, 2, 3, 99]
    assert sorted(passed.finished) == [0, 1, 2, 3, 99]
    assert max(map(len, passed.batches)) == max_batch, "its own limit"
    assert all(steps == [None] for steps in passed.steps_before.values())
    for seed, result in enumerate(results):
        assert result.batch_sizes == [4] * 4
        assert np.abs(pixels_of(result.paths[0]) - pixels(engine, seed=seed)).max() <= 1
    longer.close()


def test_one_may_come_before_every_step(engine: Engine, pipeline: Pipeline, tmp_path: Path) -> None:
    passed = Passed()
    kind = Kind("look", passed.is_due_at_every_step, passed.run, lambda lane: 1.0, max_batch=1)
    longer = engine_with(pipeline, tmp_path, kind)
    for seed, future in enumerate(submit_together(longer, passed, range(3))):
        result = future.result(timeout=30)
        assert result.batch_sizes == [3] * 4
        assert np.abs(pixels_of(result.paths[0]) - pixels(engine, seed=seed)).max() <= 1
    assert list(passed.steps_before.values()) == [[None, 749, 499, 249]] * 3
    longer.close()


def test_not_all_that_wait_are_prepared_before_the_first_is_finished(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """What it makes of each image may fill the device's memory."""
    passed = Passed()
    kind = Kind("prepare", passed.is_due_once, passed.run, lambda lane: 1.0, max_batch=2)
    engine = engine_with(pipeline, tmp_path, kind)
    num_prepared = []
    futures = submit_together(engine, passed, range(16))
    for future in futures:
        future.add_done_callback(lambda _: num_prepared.append(len(passed.steps_before)))
    for future in futures:
        future.result(timeout=30)
    assert sorted(num_prepared)[0] < 16
    engine.close()


@pytest.mark.parametrize("error", [RuntimeError("a kernel broke"), DeviceMemoryError("full")])
def test_what_fails_in_it_for_several_is_tried_for_each(
    error: Exception, pipeline: Pipeline, tmp_path: Path
) -> None:
    passed, tried = Passed(), []

    def run(pipeline: Pipeline, images: Sequence[JobImage]) -> Finish:
        tried.append(len(images))
        if len(images) > 1 or images[0].job.request.seed == 1:
            raise error
        return passed.run(pipeline, images)

    kind = Kind("prepare", passed.is_due_once, run, lambda lane: lane.pixels, max_batch=4)
    limits = BatchLimits()
    engine = Engine(pipeline, tmp_path, limits, kinds=(kind, *KINDS))
    futures = submit_together(engine, passed, range(3))
    assert [future.exception(timeout=30) for future in futures] == [None, error, None]
    assert tried == [1, 3, 1, 1, 1]
    is_about_memory = isinstance(error, DeviceMemoryError)
    assert limits(Lane(64, 64, guided=False), kind) == (1 if is_about_memory else 4)
    engine.close()


def test_one_whose_need_cannot_be_told_ends_its_request_only(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    def is_needed_by(image: JobImage) -> bool:
        return bool(image.job.request.seed // 0 if image.job.request.seed == 1 else False)

    kind = Kind("prepare", is_needed_by, Passed().run, lambda lane: 1.0, max_batch=1)
    engine = engine_with(pipeline, tmp_path, kind)
    with pytest.raises(ZeroDivisionError):
        engine.submit(request(engine, seed=1)).result(timeout=30)
    assert engine.submit(request(engine, seed=2)).result(timeout=30).paths
    engine.close()


def test_the_time_that_one_takes_is_not_waiting(pipeline: Pipeline, tmp_path: Path) -> None:
    passed = Passed()

    def run(pipeline: Pipeline, images: Sequence[JobImage]) -> Finish:
        time.sleep(0.5)
        return passed.run(pipeline, images)

    kind = Kind("prepare", passed.is_due_once, run, lambda lane: 1.0, max_batch=1)
    engine = Engine(pipeline, tmp_path, deadlines=Deadlines(queue_s=0.4), kinds=(kind, *KINDS))
    result = asyncio.run(engine.generate(request(engine)))
    assert result.seconds["queue"] < 0.4
    engine.close()


def test_an_error_of_a_unit_of_steps_is_every_images(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [RuntimeError("an illegal memory access")]

    def mark() -> Mark:
        def wait() -> float:
            if errors:
                raise errors.pop()
            return time.perf_counter()

        return wait

    engine = Engine(pipeline, tmp_path)
    monkeypatch.setattr(pipeline, "mark", mark)
    whole = engine.submit(request(engine, num_outputs=4))
    with pytest.raises(RuntimeError, match="illegal"):
        whole.result(timeout=30)
    unit = [JobImage(Job(request(engine, seed=seed)), 0) for seed in range(3)]
    errors.append(RuntimeError("an illegal memory access"))
    finish = STEP.run(pipeline, unit)
    for image in unit:
        with pytest.raises(RuntimeError, match="illegal"):
            finish(image)
    engine.close()


def test_what_nobody_waits_for_is_not_made_again(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images of a unit may be spoilt, and each is made again alone, while all others wait."""
    engine = Engine(pipeline, tmp_path)
    decode, made_again = vae.decode, []

    def overflowing(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, is_finite = decode(model, latents)
        return found, torch.zeros_like(is_finite)

    def in_float32(model: Any, latents: torch.Tensor) -> torch.Tensor:
        made_again.append(latents)
        jobs[2].unwanted.set()  # meanwhile
        return decode(model, latents)[0]

    monkeypatch.setattr(vae, "decode", overflowing)
    monkeypatch.setattr(vae, "decode_in_float32", in_float32)
    jobs = [Job(request(engine, seed=seed, num_inference_steps=2)) for seed in range(3)]
    unit = [JobImage(job, 0) for job in jobs]
    for _ in range(2):
        STEP.run(pipeline, unit)
    finish = DECODE.run(pipeline, unit)
    jobs[0].unwanted.set()
    finished = [finish(image) for image in unit]
    assert [each is not None for each in finished] == [False, True, False]
    assert len(made_again) == 1
    engine.close()
