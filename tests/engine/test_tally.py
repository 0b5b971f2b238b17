"""What the engine says of itself in numbers, while it works and when it is stuck."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch
from test_engine import Gate, request

from dmd2.engine import tally as module
from dmd2.engine.batch_limits import BatchLimits
from dmd2.engine.engine import Engine
from dmd2.engine.tally import EngineTally
from dmd2.errors import GenerationError
from dmd2.fast.tuning import Tuning
from dmd2.models import device_work
from dmd2.sampling.pipeline import Pipeline


def test_who_waits_is_counted_until_it_begins_or_leaves(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrivals count too that a stuck GPU thread has not even taken in."""
    engine = Engine(pipeline, tmp_path, BatchLimits(step=1, decode=1))
    gate, tally = Gate(pipeline, monkeypatch), engine.tally
    assert (tally.images_queued(), tally.unit_age_s()) == (0, 0.0)

    async def leave() -> None:
        task = asyncio.create_task(engine.generate(request(engine, num_outputs=4)))
        await asyncio.sleep(0)
        assert tally.images_queued() == 3 + 4
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    first = engine.submit(request(engine))
    assert gate.reached.acquire(timeout=20)
    assert (tally.images_queued(), tally.unit_age_s() > 0) == (0, True)
    second = engine.submit(request(engine, num_outputs=3))
    assert tally.images_queued() == 3
    asyncio.run(leave())
    assert tally.images_queued() == 3
    gate.let(16)
    for future in (first, second):
        future.result(timeout=20)
    assert tally.images_queued() == 0
    engine.close()
    assert tally.images_of_units() == {"step": {1: 16}, "decode": {1: 4}}
    assert tally.unit_age_s() == 0.0


def test_who_can_never_begin_is_not_counted(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(pipeline, tmp_path, BatchLimits(step=1))
    gate = Gate(pipeline, monkeypatch)
    futures = [engine.submit(request(engine)) for _ in range(2)]
    assert gate.reached.acquire(timeout=20)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.let(1)
    closing.join(timeout=20)
    for future in futures:
        with pytest.raises(GenerationError):
            future.result(timeout=20)
    assert engine.tally.images_queued() == 0


def test_images_that_share_a_unit_are_counted_by_their_number(engine: Engine) -> None:
    engine.submit(request(engine, num_outputs=3)).result(timeout=20)
    assert engine.tally.images_of_units()["step"] == {3: 4}


def test_only_the_gpu_thread_looks_at_memory_and_seldom(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks torch from another thread would hold its allocator's lock."""
    looks: list[str] = []

    def look(device: torch.device) -> tuple[int, int]:
        looks.append(threading.current_thread().name)
        return len(looks), 80

    monkeypatch.setattr(device_work, "memory_use", look)
    engine = Engine(pipeline, tmp_path)
    engine.warm_up(max_batch=1, tuning=Tuning("off"))  # the pipeline stays plain
    assert (engine.tally.memory(), looks) == ((1, 80), ["dmd2-gpu"]), "before any request"
    monkeypatch.setattr(module, "_LOOK_AT_MEMORY_S", 1e9)
    engine.submit(request(engine)).result(timeout=20)
    assert engine.tally.memory() == (1, 80)
    monkeypatch.setattr(module, "_LOOK_AT_MEMORY_S", 0.0)
    engine.submit(request(engine)).result(timeout=20)
    engine.close()
    assert engine.tally.memory() == (len(looks), 80)
    assert len(looks) > 4
    assert set(looks) == {"dmd2-gpu"}


def test_a_cpu_has_no_memory_to_tell_of() -> None:
    tally = EngineTally([], torch.device("cpu"))
    tally.look_at_memory()
    assert tally.memory() is None
