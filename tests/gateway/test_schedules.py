"""Random schedules of arrivals, deaths, cancellations and ends, and what holds in each."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from gateway.fake_engines import FakeEngines, answer_to, prediction, settled, work
from gateway.gateways import Gateway, run

from deploy.gateway.life.refusals import QueueFullError
from deploy.gateway.prediction import Prediction

MAX_QUEUED = 12


class Schedule:
    """One random history of a gateway, told step by step."""

    def __init__(self, seed: int, folder: Path, kills: bool, is_journaled: bool) -> None:
        self.dice = random.Random(seed)
        engines = FakeEngines(
            self.dice.randint(1, 3), self.dice.randint(1, 4), is_held=True, killers=["die"]
        )
        self.gateway = Gateway.on(folder, engines, max_queued=MAX_QUEUED)
        self.engines, self.kills, self.is_journaled = engines, kills, is_journaled
        self.accepted: dict[str, Prediction] = {}
        self.cancelled: set[str] = set()
        self.hit: dict[str, int] = {}

    async def step(self) -> None:
        """Do one thing, and look at what must hold."""
        await self.dice.choice([self.arrive, self.arrive, self.end, self.end, self.strike])()
        await settled(self.dice.choice([0, 1, 3, 40]))
        running = [self.accepted[id] for id in self.engines.under_way]
        assert len(running) == 1 or all(one.num_attempts < 3 for one in running), "not alone"

    async def arrive(self) -> None:
        for _ in range(self.dice.randint(1, 4)):
            id = str(len(self.accepted))
            prompt = "die" if self.dice.random() < 0.04 else "live"
            one = prediction(id, prompt, seed=int(id), is_journaled=self.is_journaled)
            line = self.gateway.predictions.num_queued
            try:
                await self.gateway.predictions.accept(one)
            except QueueFullError:
                assert line >= MAX_QUEUED
                return
            self.accepted[id] = one

    async def end(self) -> None:
        done = [id for id, future in self.engines.under_way.items() if not future.done()]
        live = [id for id in done if self.accepted[id].work.request.prompt == "live"]  # type: ignore[union-attr]
        for id in self.dice.sample(live, min(len(live), self.dice.randint(1, 3))):
            self.engines.finish(id)

    async def strike(self) -> None:
        if self.kills and self.dice.random() < 0.3:
            engine = self.dice.randrange(len(self.engines.running))
            for id in self.engines.running[engine]:
                self.hit[id] = self.hit.get(id, 0) + 1
            self.engines.kill(engine)
        elif self.accepted:
            id = self.dice.choice(list(self.accepted))
            if self.gateway.predictions.cancel(id):
                self.cancelled.add(id)

    async def come_to_an_end(self) -> None:
        while self.gateway.predictions.num_under_way:
            await settled()
            for id, future in list(self.engines.under_way.items()):
                if not future.done() and self.accepted[id].work.request.prompt == "live":  # type: ignore[union-attr]
                    self.engines.finish(id)
            one = next(iter(self.gateway.predictions._lives.values()), None)
            if one is not None:
                await self.gateway.predictions.wait(one.prediction, 0.005)

    def check(self, one: Prediction) -> None:
        """Fail unless a prediction came to the end that it must come to."""
        assert one.ended.is_set()
        assert self.gateway.told.count((one.id, "completed")) == 1
        assert self.gateway.told.count((one.id, "start")) <= 1
        assert one.num_attempts <= 3
        assert one.outcome is not None
        is_killer = one.inputs["prompt"] == "die"
        assert (one.status == "canceled") == (one.id in self.cancelled)
        if one.status == "succeeded":
            assert not is_killer
            said = answer_to(work(one.id, "live", int(one.id)))
            assert one.outcome.outputs == said.outputs
        elif one.status == "failed":
            assert one.num_attempts == 3
            assert is_killer or self.hit.get(one.id, 0) >= 1


@pytest.mark.parametrize("seed", range(30))
def test_each_that_is_accepted_ends_once_and_rightly(seed: int, tmp_path: Path) -> None:
    async def test() -> None:
        schedule = Schedule(seed, tmp_path / "j", seed % 2 == 0, is_journaled=seed % 10 == 9)
        for _ in range(60):
            await schedule.step()
        await schedule.come_to_an_end()
        await settled()
        for one in schedule.accepted.values():
            schedule.check(one)
        if not schedule.is_journaled:  # being written takes some longer than others
            firsts = list(dict.fromkeys(schedule.engines.asked))
            assert firsts == sorted(firsts, key=int), "not in order"
        schedule.gateway.assert_nothing_is_left()

    run(test)
