"""What Ray says of an engine, as the gateway hears it; a stand-in plays Ray's handle."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytestmark = pytest.mark.scale
ray = pytest.importorskip("ray")

from deploy.gateway.engines import ray_engines  # noqa: E402
from deploy.gateway.engines.ray_engines import MAX_ONGOING, RayEngines  # noqa: E402
from deploy.gateway.work import EngineDiedError, Outcome, Work  # noqa: E402
from dmd2.errors import ModelError  # noqa: E402

WORK: Any = Work("a", None)  # type: ignore[arg-type]


class Response:
    """Ray's answer to come: a result, an error, or never."""

    def __init__(self, result: Any) -> None:
        self._result, self.num_cancelled = result, 0

    def cancel(self) -> None:
        self.num_cancelled += 1

    def __await__(self) -> Any:
        return self._outcome().__await__()

    async def _outcome(self) -> Any:
        if self._result is None:
            await asyncio.Event().wait()
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


class Handle:
    """Answers each call with the next result."""

    def __init__(self, *results: Any) -> None:
        self.responses = [Response(each) for each in results]
        self._left = iter(self.responses)
        self.run = self.card = self

    def remote(self, *_: Any) -> Response:
        return next(self._left)


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorDiedError(),
        ray.exceptions.ActorUnavailableError("gone", None),
        ray.exceptions.NodeDiedError("gone"),
        ray.exceptions.ObjectLostError("0" * 56, None, ""),
        ray.exceptions.OwnerDiedError("0" * 56, None, ""),
        ray.exceptions.OutOfMemoryError("too much"),
        ray.exceptions.WorkerCrashedError(),
        ray.exceptions.TaskCancelledError(),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_took_the_engine_another_may_do_the_work(error: BaseException) -> None:
    with pytest.raises(EngineDiedError):
        asyncio.run(RayEngines(Handle(error)).run(WORK))


def test_what_the_engine_says_is_passed_on() -> None:
    outcome = Outcome(error="it could not be done")
    assert asyncio.run(RayEngines(Handle(outcome)).run(WORK)) is outcome


@pytest.mark.parametrize(
    "error", [ValueError("a fault of ours"), ray.exceptions.RaySystemError("x")]
)
def test_what_is_no_death_is_not_tried_again(error: Exception) -> None:
    with pytest.raises(type(error)):
        asyncio.run(RayEngines(Handle(error)).run(WORK))


def test_who_cancels_is_heard_by_the_engine() -> None:
    handle = Handle(None)

    async def cancel() -> None:
        task = asyncio.create_task(RayEngines(handle).run(WORK))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert handle.responses[0].num_cancelled == 1


def found_in_turn(monkeypatch: pytest.MonkeyPatch, *found: Any) -> None:
    """Have Serve's controller say these, one after the other and the last for ever."""
    left = list(found)

    def look() -> Any:
        said = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr(ray_engines, "_found", look)
    monkeypatch.setattr(ray_engines, "_LOOK_S", 0.01)


def test_who_waits_hears_of_engines_that_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    controller_is_gone = ray.exceptions.ActorDiedError()
    found_in_turn(monkeypatch, (0, None), (2, None), controller_is_gone, (2, None), (1, None))

    async def follow() -> list[tuple[int, int]]:
        engines = RayEngines(Handle("the card"))
        assert (engines.num_ready, engines.capacity) == (0, 0)
        assert await asyncio.wait_for(engines.card(), 5) == "the card"
        seen = [(engines.num_ready, engines.capacity)]
        await asyncio.wait_for(engines.changed(), 5)
        seen.append((engines.num_ready, engines.capacity))
        await engines.close()
        return seen

    assert asyncio.run(follow()) == [(2, 2 * MAX_ONGOING), (1, MAX_ONGOING)]


def test_an_engine_that_dies_when_asked_for_its_card_is_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found_in_turn(monkeypatch, (1, None))
    engines = Handle(ray.exceptions.ActorDiedError(), "the card")

    async def card() -> Any:
        return await asyncio.wait_for(RayEngines(engines).card(), 5)

    assert asyncio.run(card()) == "the card"


def test_engines_that_cannot_be_started_are_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found_in_turn(monkeypatch, (0, None), (0, "no weights"))

    async def card() -> Any:
        return await asyncio.wait_for(RayEngines(Handle()).card(), 5)

    with pytest.raises(ModelError, match="no weights"):
        asyncio.run(card())
