"""Saving in bounded space: nobody waits for ever, passes the bound, or keeps room in vain."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hub_world import raising

from dmd2.engine import image_io
from dmd2.engine.batch_limits import BatchLimits
from dmd2.engine.delivery import Delivery
from dmd2.engine.engine import Engine
from dmd2.engine.job import STAGES, Job, JobImage
from dmd2.engine.units import Finished
from dmd2.errors import GenerationError, InvalidRequestError
from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.server import output_space
from dmd2.server.output_space import OutputSpace, size_of

KB = 1000
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for after a request's end."""
    monkeypatch.setattr(output_space, "_QUIET_S", 0.0)


class Full:
    """Space that is there only once it is let."""

    max_bytes = 10**9

    def __init__(self) -> None:
        self.asked, self.there = threading.Event(), threading.Event()

    def make_room(self, folder: Path, num_bytes: int) -> bool:
        self.asked.set()
        return self.there.is_set()

    def written(self, folder: Path, num_bytes: int) -> None:
        pass

    def over(self, folder: Path) -> None:
        pass


@pytest.fixture
def full(pipeline: Pipeline, tmp_path: Path) -> Iterator[tuple[Engine, Full]]:
    space = Full()
    engine = Engine(pipeline, tmp_path, space=space)
    yield engine, space
    engine.close()


def test_saving_waits_for_space(full: tuple[Engine, Full]) -> None:
    engine, space = full
    future = engine.submit(GenerationRequest.resolve(engine.card, prompt="x"))
    assert space.asked.wait(timeout=20)
    assert not future.done()
    space.there.set()
    assert future.result(timeout=20).paths[0].exists()


def test_closing_ends_what_waits_for_space(full: tuple[Engine, Full]) -> None:
    engine, space = full
    future = engine.submit(GenerationRequest.resolve(engine.card, prompt="x"))
    assert space.asked.wait(timeout=20)
    engine.close()
    assert isinstance(future.exception(timeout=20), GenerationError)


def test_a_request_that_could_be_more_than_all_space_is_refused(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    engine = Engine(pipeline, tmp_path / "out", space=OutputSpace(tmp_path, 60 * KB))
    fits = GenerationRequest.resolve(engine.card, prompt="x", num_outputs=2)
    large = GenerationRequest.resolve(engine.card, prompt="x", num_outputs=4)
    with pytest.raises(InvalidRequestError, match=r"num_outputs: 4 .*DMD2_MAX_OUTPUT_BYTES"):
        engine.submit(large)
    assert len(engine.submit(fits).result(timeout=20).paths) == 2
    engine.close()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("share", [1.0, 1.6, 2.5])
def test_requests_do_not_wait_for_each_other(
    share: float, pipeline: Pipeline, tmp_path: Path
) -> None:
    """Images of several sizes are finished in turns: none may stand in the way of another's."""
    sizes = ((64, 64), (72, 64), (64, 72))
    most = image_io.most_bytes(
        GenerationRequest.resolve(pipeline.card, prompt="x", num_outputs=4, width=72, height=64)
    )
    space = OutputSpace(tmp_path, int(share * most))
    engine = Engine(pipeline, tmp_path, BatchLimits(step=16), space=space)
    made = 0

    async def ask(seed: int) -> None:
        nonlocal made
        width, height = sizes[seed % 3]
        request = GenerationRequest.resolve(
            engine.card, prompt="x", num_outputs=4, seed=seed, width=width, height=height
        )
        paths = (await engine.generate(request)).paths
        made += sum(path.stat().st_size for path in paths)
        for path in paths:
            path.read_bytes()

    async def ask_all() -> None:
        await asyncio.wait_for(asyncio.gather(*map(ask, range(9))), timeout=60)

    asyncio.run(ask_all())
    assert made > 1.5 * space.max_bytes
    engine.close()


@pytest.fixture
def slow_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding takes long enough for a request to end meanwhile."""
    encode = image_io.encode

    def slow(*args: Any) -> bytes:
        time.sleep(0.1)
        return encode(*args)

    monkeypatch.setattr(image_io, "encode", slow)


def finished_job(card: ModelCard, delivery: Delivery, num_taken: int = 4) -> Job:
    """A job of four images, of which so many were taken for delivery."""
    job = Job(GenerationRequest.resolve(card, prompt="x", num_outputs=4))
    job.conditioning = SimpleNamespace(embeds=[SimpleNamespace(truncated="")])
    for stage in STAGES:
        job.ended(stage)
    for index in range(num_taken):
        delivery.take(JobImage(job, index), Finished(NOISE, None, False))
    return job


@pytest.mark.usefixtures("quiet", "slow_encode")
def test_what_is_cancelled_while_it_is_saved_passes_no_bound_and_leaves_nothing(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    most = image_io.most_bytes(GenerationRequest.resolve(pipeline.card, prompt="x", num_outputs=4))
    space, largest = OutputSpace(tmp_path, int(1.5 * most)), 0
    delivery = Delivery(tmp_path, "off", space)
    for _ in range(12):
        job = finished_job(pipeline.card, delivery)
        time.sleep(0.06)
        job.unwanted.set()
        delivery.over(job)
        largest = max(largest, size_of(tmp_path))
    delivery.close()
    assert 0 < max(largest, size_of(tmp_path)) <= space.max_bytes
    assert not delivery._jobs
    for folder in tmp_path.iterdir():
        for path in folder.iterdir():
            path.read_bytes()
    assert space.make_room(tmp_path / "new", int(1.4 * most)), "all of it can go"


@pytest.mark.parametrize("end", ["withheld", "failed", "cancelled"])
def test_room_is_given_back_however_a_job_ends(
    end: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    space = OutputSpace(tmp_path, 80 * KB)
    delivery = Delivery(tmp_path, "withhold", space)
    job = finished_job(pipeline.card, delivery, num_taken=3)
    while len(list(tmp_path.glob("*/*.png"))) < 3 or delivery._jobs[job].num_writing:
        time.sleep(0.01)
    if end == "withheld":
        delivery.take(JobImage(job, 3), Finished(NOISE, 0.9, True))
    elif end == "failed":
        job.fail(GenerationError("on the device"))
    else:
        job.unwanted.set()
        delivery.over(job)
    delivery.close()
    assert not delivery._jobs
    assert space.make_room(tmp_path / "new", 10 * KB)
    assert set(space._rooms) == {tmp_path / "new"}


def test_a_file_that_cannot_be_written_whole_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rename", raising(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        image_io.write(tmp_path / "image.png", b"png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp"])
def test_no_file_is_larger_than_what_is_kept_free_for_it(
    output_format: str, pipeline: Pipeline
) -> None:
    pixels = np.random.default_rng(3).integers(0, 2, (512, 512, 3), np.uint8) * 255
    request = GenerationRequest.resolve(
        pipeline.card, prompt="\U0001f600" * 4000, output_format=output_format,
        output_quality=100, width=512, height=512,
    )  # fmt: skip
    assert len(image_io.encode(pixels, request, 0)) <= image_io.most_bytes(request)
