"""What an engine of a gateway answers: the container's words, its pixels, nothing left behind."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from model_folders import StockDiffusers
from PIL import Image

from deploy.gateway.engines import local_engine
from deploy.gateway.engines.engine_host import EngineHost
from deploy.gateway.engines.local_engine import CAPACITY, LocalEngine
from deploy.gateway.work import Outcome, Work
from dmd2.errors import DeadlineError, ModelError
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraInputs
from dmd2.server import logs
from dmd2.settings import Settings


def work_of(host: EngineHost, id: str = "p1", **inputs: Any) -> Work:
    given = {"prompt": "a red circle", "seed": 5, **inputs}
    loras = LoraInputs.taken_from(given)
    return Work(id, GenerationRequest.resolve(host.card, **given), loras)


def opened(output: bytes) -> Image.Image:
    head, _, content = output.partition(b",")
    image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert head.decode() == f"data:{image.get_format_mimetype()};base64"
    return image


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp"])
def test_outputs_are_the_files_and_nothing_stays(
    output_format: str, host: EngineHost, host_settings: Settings, stock: StockDiffusers
) -> None:
    work = work_of(host, num_outputs=2, output_format=output_format)
    outcome = asyncio.run(host.run(work))
    assert outcome.error is None
    assert len(outcome.outputs) == 2
    for index, output in enumerate(outcome.outputs):
        image = opened(output)
        assert image.size == (64, 64)
        if output_format == "png":
            difference = np.asarray(image).astype(np.int16) - stock.image(work.request, index)
            assert np.abs(difference).max() <= 1
    assert list(host_settings.output_dir.iterdir()) == []


def test_logs_and_metrics_are_the_containers(host: EngineHost) -> None:
    """tests/server/test_server.py asks the same of the container."""
    prompt = "one " * 75 + "cut here"
    outcome = asyncio.run(host.run(work_of(host, prompt=prompt, seed=41, width=64, height=72)))
    assert outcome.logs.splitlines() == [
        "tiny: seed 41, 64x72",
        "note: prompt was cut at 77 tokens; the metric unread has the rest",
    ]
    metrics = dict(outcome.metrics)
    assert set(metrics.pop("seconds")) == {"queue", "encode", "sample", "decode", "check", "save"}
    assert 0 < metrics.pop("predict_time") < 60
    assert metrics == {
        "model": "tiny",
        "seeds": [41],
        "width": 64,
        "height": 72,
        "steps": 4,
        "batch_sizes": [1] * 4,
        "ways": {"step": "plain", "decode": "plain"},
        "images": 1,
        "unread": {"prompt": "cut here"},
    }
    json.dumps(metrics)


def test_a_refusal_is_an_outcome_with_what_was_told_before(host: EngineHost) -> None:
    outcome = asyncio.run(host.run(work_of(host, lora_weights="owner/repo")))
    assert outcome.outputs == ()
    assert outcome.error is not None
    assert outcome.error.startswith("InvalidRequestError: lora_weights: 'owner/repo' is not allow")
    assert outcome.logs == "tiny: seed 5, 64x64\n"
    assert outcome.metrics["seeds"] == [5]
    assert "images" not in outcome.metrics


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DeadlineError("Cancelled too late"), "DeadlineError: canceled too late"),
        (ZeroDivisionError("division"), "ZeroDivisionError: division"),
    ],
)
def test_an_unforeseen_end_is_logged_with_the_id_and_told(
    error: Exception,
    said: str,
    host: EngineHost,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(*_: object) -> None:
        raise error

    named = []
    monkeypatch.setattr(host._service, "generate", fail)
    monkeypatch.setattr(caplog.handler, "emit", lambda record: named.append(logs.prediction_id()))
    outcome = asyncio.run(host.run(work_of(host, id="mine")))
    assert outcome.error == said
    assert named == ["mine"]
    assert logs.prediction_id() is None


def test_whoever_cancels_ends_the_work(host: EngineHost) -> None:
    async def cancelled() -> float:
        large = work_of(host, width=768, height=768, num_outputs=4)
        running = asyncio.create_task(host.run(large))
        while host._service.engine.tally.unit_age_s() == 0:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        after = await asyncio.wait_for(host.run(work_of(host)), 20)
        return float(after.metrics["seconds"]["queue"])

    assert asyncio.run(cancelled()) < 10


def test_no_prompt_is_logged_unless_asked_for(
    host: EngineHost, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        asyncio.run(host.run(work_of(host, prompt="hush")))
    assert "1 images of 64x64 from seed 5 in " in caplog.text
    assert "hush" not in caplog.text


class FakeHost:
    """A host whose health a test sets."""

    card = "card"
    said: str | None = None
    is_closed = False

    async def run(self, work: Work) -> Outcome:
        return Outcome(logs=str(work))

    def problem(self) -> str | None:
        return self.said

    def close(self) -> None:
        self.is_closed = True


@asynccontextmanager
async def local(open_host: Callable[..., Any]) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(Settings("none"), open_host)
    yield engine
    await engine.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


def test_a_local_engine_takes_work_while_it_has_no_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_engine, "_LOOK_S", 0.01)
    host = FakeHost()

    async def test() -> None:
        async with local(lambda settings: host) as engine:
            assert (engine.num_ready, engine.capacity) == (0, 0)
            first = asyncio.create_task(engine.changed())
            assert await engine.card() == "card"
            await first
            assert (engine.num_ready, engine.capacity) == (1, CAPACITY)
            host.said = "no disk"
            await engine.changed()
            assert (engine.num_ready, engine.capacity) == (0, 0)
            host.said = None
            await engine.changed()
            assert engine.num_ready == 1
            assert (await engine.run("w")).logs == "w"  # type: ignore[arg-type]

    run(test)
    assert host.is_closed


def test_a_model_that_cannot_be_loaded_is_told_to_each_who_waits() -> None:
    def fail(settings: Settings) -> EngineHost:
        raise OSError("no such file")

    async def test() -> None:
        async with local(fail) as engine:
            for _ in range(2):
                with pytest.raises(ModelError, match="cannot be opened: no such file"):
                    await engine.card()

    run(test)


def test_who_leaves_while_the_model_is_loaded_stops_nothing() -> None:
    async def test() -> None:
        loading, host = asyncio.Event(), FakeHost()
        loop = asyncio.get_running_loop()

        def open_host(settings: Settings) -> Any:
            asyncio.run_coroutine_threadsafe(loading.wait(), loop).result()
            return host

        async with local(open_host) as engine:
            first = asyncio.create_task(engine.card())
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.wait([first])
            loading.set()
            assert await engine.card() == "card"

    run(test)
