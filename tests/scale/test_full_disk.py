"""Work that an engine sends back for want of room, as the gateway hears it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytestmark = pytest.mark.scale
pytest.importorskip("ray")

from test_ray_engines import WORK, Handle, found_in_turn  # noqa: E402

from deploy.gateway.engines import ray_engines  # noqa: E402
from deploy.gateway.engines.ray_engines import Engine, NotNow, RayEngines  # noqa: E402
from deploy.gateway.work import Outcome, Work  # noqa: E402
from dmd2.settings import Settings  # noqa: E402

DONE = Outcome(logs="done")


class Host:
    """Does work at once, while its disk has room."""

    card: Any = None
    said: str | None = "no room"

    async def run(self, work: Work) -> Outcome:
        return DONE

    def problem(self) -> str | None:
        return self.said


def test_what_one_engine_sends_back_another_does() -> None:
    full = NotNow("an engine", "no room")
    assert asyncio.run(RayEngines(Handle(full, full, DONE)).run(WORK)) is DONE


def test_engines_without_room_are_not_ready_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    found_in_turn(monkeypatch, (2, None))
    monkeypatch.setattr(ray_engines, "_FULL_S", 0.3)
    full = [NotNow(f"engine {name}", "no room") for name in "aab"]

    async def follow() -> None:
        engines = RayEngines(Handle("the card", *full, DONE))
        await engines.card()
        await engines.run(WORK)
        for num_ready in (0, 2):
            while engines.num_ready != num_ready:
                await engines.changed()
        await engines.close()

    asyncio.run(asyncio.wait_for(follow(), 10))


def test_an_engine_without_room_holds_work_and_then_sends_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_engines, "_HOLD_S", 0.2)
    monkeypatch.setattr(ray_engines, "_LOOK_S", 0.05)
    host = Host()
    engine = Engine(Settings("none"), lambda _: host)

    async def ask() -> Outcome | NotNow:
        asking = asyncio.create_task(engine.run(WORK))
        await asyncio.sleep(0.1)
        assert not asking.done()
        return await asking

    said = asyncio.run(ask())
    assert isinstance(said, NotNow)
    assert said.problem == "no room"
    host.said = None
    assert asyncio.run(engine.run(WORK)) is DONE
