"""A gateway's predictions before fake engines, on an event loop whose clock a test holds."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.fake_engines import FakeEngines, prediction, settled

from deploy.gateway.keeping.journal import Journal
from deploy.gateway.life.predictions import Predictions
from deploy.gateway.prediction import Event, Prediction
from deploy.gateway.settings import GatewaySettings

_OPEN: list[Gateway] = []


class Clock:
    """The event loop's, which stands still between two words of the test."""

    def __init__(self) -> None:
        self._now = asyncio.get_running_loop().time()
        asyncio.get_running_loop().time = lambda: self._now  # type: ignore[method-assign]

    async def advance(self, seconds: float) -> None:
        """Let time pass, and all happen that it is time for."""
        self._now += seconds
        await settled()


@dataclass
class Gateway:
    """Predictions, what they are made of, and what they told."""

    folder: Path
    engines: FakeEngines
    journal: Journal
    predictions: Predictions
    told: list[tuple[str, Event]] = field(default_factory=list)

    @classmethod
    def on(cls, folder: Path, engines: FakeEngines | None = None, **settings: Any) -> Gateway:
        """A gateway with a journal in a folder, by default before one engine that answers."""
        journal = Journal(folder)
        told: list[tuple[str, Event]] = []
        engines = FakeEngines() if engines is None else engines
        predictions = Predictions(
            engines,
            GatewaySettings(**settings),
            journal,
            lambda one, event: told.append((one.id, event)),
        )
        _OPEN.append(cls(folder, engines, journal, predictions, told))
        return _OPEN[-1]

    async def accept(self, id: str, **inputs: Any) -> Prediction:
        """Accept a prediction of these inputs, and let it go as far as it can."""
        one = prediction(id, **inputs)
        await self.predictions.accept(one)
        await settled()
        return one

    async def accept_all(self, ids: str, **inputs: Any) -> list[Prediction]:
        """Accept one for each letter."""
        return [await self.accept(id, **inputs) for id in ids]

    async def finish(self, *ids: str) -> None:
        """Have held work end, and wait for what comes of it."""
        for id in ids:
            self.engines.finish(id)
            await settled()

    async def kill(self, engine: int = 0) -> None:
        """Have an engine die, and wait for what comes of it."""
        self.engines.kill(engine)
        await settled()

    async def has_sent(self, id: str, num_times: int = 1) -> None:
        """Wait until engines were given work so many times: what is journaled takes a thread."""
        while self.engines.asked.count(id) < num_times:
            await asyncio.sleep(0.005)

    def as_after_a_kill(self) -> Path:
        """What the disk would hold if the process were killed now: a copy of the folder."""
        copy = self.folder.with_name(f"{self.folder.name}-killed")
        return shutil.copytree(self.folder, copy)

    def assert_nothing_is_left(self) -> None:
        """Fail unless queue and slots are empty, and nothing is remembered."""
        predictions = self.predictions
        assert (predictions.num_queued, predictions.num_under_way) == (0, 0)
        line = predictions._line
        assert (line.fresh, line.suspects, line.running, line._is_alone) == ([], [], set(), False)
        assert not self.engines.under_way
        assert len(asyncio.all_tasks()) == 1, asyncio.all_tasks()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a loop of its own, 60 s at most; an exception that nobody hears fails it."""
    unheard: list[Any] = []

    async def heard() -> None:
        loop, me = asyncio.get_running_loop(), asyncio.current_task()
        loop.set_exception_handler(lambda _, context: unheard.append(context))
        # Not the loop's own timer, whose clock the test holds.
        guard = threading.Timer(60, lambda: loop.call_soon_threadsafe(me.cancel, "hangs"))
        guard.daemon = True
        guard.start()
        try:
            await test()
        finally:
            guard.cancel()
        gc.collect()
        await settled()

    try:
        asyncio.run(heard())
    finally:
        while _OPEN:
            _OPEN.pop().journal.close()
    assert unheard == []
