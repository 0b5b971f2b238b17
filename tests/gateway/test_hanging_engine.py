"""An engine whose device hangs answers nothing: it ends its process, which is a death like others.

Here the process lives on, since the tests run in it; a device really hangs a process to its end in
tests/scale/test_deaths.py, and with one engine here with --full.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from gateway.test_engine_host import work_of

from deploy.gateway.engines import vigil
from deploy.gateway.engines.engine_host import EngineHost
from dmd2.sampling.pipeline import Pipeline
from dmd2.settings import Settings

QUEUE_S, STEP_S, RUN_S = 0.4, 0.6, 2.0
IN_ONE_UNIT = "the GPU thread has been in one unit of work for 2 s"


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why this process would have ended, each time that it would."""
    reasons: list[str] = []
    monkeypatch.setattr(vigil, "end_process", reasons.append)
    monkeypatch.setattr(vigil, "_LOOK_S", 0.05)
    return reasons


@pytest.fixture
def impatient(host_settings: Settings, ends: list[str]) -> Iterator[EngineHost]:
    """An engine with short deadlines."""
    settings = dataclasses.replace(host_settings, queue_timeout_s=QUEUE_S, run_timeout_s=RUN_S)
    host = EngineHost(settings)
    yield host
    host.close()


class Hang:
    """The GPU thread stays in its next step until a test lets it go."""

    def __init__(self, host: EngineHost, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.is_over = threading.Event(), threading.Event()
        pipeline: Pipeline = host._service.engine._pipeline
        self._step = pipeline.step
        monkeypatch.setattr(pipeline, "step", self._hanging)

    def _hanging(self, samples: Sequence[Any]) -> None:
        self.reached.set()
        assert self.is_over.wait(20)
        self._step(samples)


def wait_for(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_hanging_engine_holds_gets_no_answer(
    impatient: EngineHost, ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what runs nor what waits, though the deadlines of both pass."""
    hang = Hang(impatient, monkeypatch)

    async def test() -> None:
        runs = asyncio.create_task(impatient.run(work_of(impatient, "runs")))
        await asyncio.to_thread(hang.reached.wait, 20)
        waits = asyncio.create_task(impatient.run(work_of(impatient, "waits", seed=6)))
        await asyncio.to_thread(wait_for, lambda: ends)
        assert ends[0] == IN_ONE_UNIT
        assert not runs.done()
        assert not waits.done()
        hang.is_over.set()
        await asyncio.gather(runs, waits)

    asyncio.run(test())


def test_a_late_request_of_an_engine_that_works_fails_for_good(
    impatient: EngineHost, ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = impatient._service.engine._pipeline
    step = pipeline.step

    def slow_step(samples: Sequence[Any]) -> None:
        time.sleep(STEP_S)
        step(samples)

    monkeypatch.setattr(pipeline, "step", slow_step)

    async def test() -> list[str | None]:
        large = work_of(impatient, "large")
        other = work_of(impatient, "other", width=72, height=64)
        both = [impatient.run(each) for each in (large, other)]
        return [outcome.error for outcome in await asyncio.gather(*both)]

    errors = asyncio.run(test())
    assert [error.split(" for ")[0] for error in errors if error] == [
        "DeadlineError: the request ran",
        "DeadlineError: the request waited",
    ]
    assert ends == []


def test_an_engine_whose_thread_has_ended_ends_the_process(
    impatient: EngineHost, ends: list[str]
) -> None:
    impatient._service.engine._arrivals.put(None)
    wait_for(lambda: ends)
    assert ends[0] == "the GPU thread has ended"


def test_closing_an_engine_that_hangs_ends_the_process(
    impatient: EngineHost, ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = Hang(impatient, monkeypatch)

    async def cancelled() -> None:
        running = asyncio.create_task(impatient.run(work_of(impatient)))
        await asyncio.to_thread(hang.reached.wait, 20)
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(cancelled())
    closing = threading.Thread(target=impatient.close)
    closing.start()
    wait_for(lambda: ends)
    assert ends[0] == IN_ONE_UNIT
    assert closing.is_alive()
    hang.is_over.set()
    closing.join(20)
    assert not closing.is_alive()


def test_an_engine_that_is_closed_ends_nothing_else(
    impatient: EngineHost, ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its thread has ended, and images are still being saved."""
    delivery = impatient._service.engine._delivery
    close = delivery.close
    monkeypatch.setattr(delivery, "close", lambda: (time.sleep(0.3), close()))
    impatient.close()
    time.sleep(0.1)
    assert ends == []
