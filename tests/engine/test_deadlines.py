"""DMD2_QUEUE_TIMEOUT_S and DMD2_RUN_TIMEOUT_S, and what the health check sees of a stuck GPU."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from test_engine import Gate, request

from dmd2.engine.batch_limits import BatchLimits
from dmd2.engine.deadlines import Deadlines
from dmd2.engine.engine import Engine
from dmd2.errors import DeadlineError
from dmd2.sampling.pipeline import Pipeline


def test_who_waits_too_long_is_told_and_leaves(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(pipeline, tmp_path, BatchLimits(step=1), deadlines=Deadlines(queue_s=0.2))
    gate = Gate(pipeline, monkeypatch)

    async def two() -> list[object]:
        first = asyncio.create_task(engine.generate(request(engine)))
        await asyncio.to_thread(gate.reached.acquire, timeout=20)
        second = asyncio.create_task(engine.generate(request(engine, seed=9)))
        await asyncio.wait([second], timeout=20)
        gate.let(4)
        return await asyncio.gather(first, second, return_exceptions=True)

    first, second = asyncio.run(two())
    assert isinstance(second, DeadlineError)
    assert "waited for 0.2 s" in str(second)
    assert "DMD2_QUEUE_TIMEOUT_S" in str(second)
    assert not isinstance(first, BaseException), "its first step had begun in time"
    assert gate.steps == [[999], [749], [499], [249]], "the second took none"
    engine.close()


def test_who_runs_too_long_is_told_and_frees_the_device(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(pipeline, tmp_path, deadlines=Deadlines(run_s=0.2))
    gate = Gate(pipeline, monkeypatch)
    with pytest.raises(DeadlineError, match=r"ran for 0\.2 s.*DMD2_RUN_TIMEOUT_S"):
        asyncio.run(engine.generate(request(engine)))
    assert engine.problem() == "the GPU thread has been in one unit of work for 0.2 s"
    gate.let(1)
    deadline = time.monotonic() + 20
    while engine.problem() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.undo()
    assert asyncio.run(engine.generate(request(engine))).paths[0].exists()
    assert gate.steps == [[999]], "it took no step that nobody waited for"
    engine.close()
    assert engine.problem() == "the GPU thread has ended"
