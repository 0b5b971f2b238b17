"""The life of predictions: queue, tries, cancellation, deadline, drain."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from gateway.fake_engines import FakeEngines, answer_to, prediction, settled, work
from gateway.gateways import Clock, Gateway, run

from deploy.gateway.keeping.journal import Journal
from deploy.gateway.life.refusals import DrainingError, IdInUseError, QueueFullError
from deploy.gateway.work import EngineDiedError, Outcome, Work
from dmd2.errors import GenerationError
from dmd2.settings import ROOT


def test_a_prediction_starts_is_processed_and_succeeds(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        one = prediction("a")
        await gateway.predictions.accept(one)
        assert (one.status, one.started_at, one.num_attempts) == ("starting", None, 0)
        await settled()
        assert (one.status, one.completed_at, one.num_attempts) == ("processing", None, 1)
        assert gateway.predictions.find("a") is one
        assert gateway.predictions.is_under_way("a")
        assert not one.ended.is_set()
        await gateway.finish("a")
        assert one.status == "succeeded"
        assert one.ended.is_set()
        assert one.created_at <= one.started_at <= one.completed_at  # type: ignore[operator]
        said = answer_to(work("a"))
        assert one.outcome is not None
        assert one.outcome.outputs == said.outputs
        assert one.outcome.metrics == {**said.metrics, "attempts": 1}
        assert gateway.told == [("a", e) for e in ("start", "output", "logs", "completed")]
        assert gateway.predictions.find("a") is None
        assert gateway.predictions.ended == {("cog", "succeeded"): 1}
        assert gateway.predictions.attempts == {"new": 1}
        gateway.assert_nothing_is_left()

    run(test)


def test_only_what_came_out_is_told(tmp_path: Path) -> None:
    async def test() -> None:
        engines = FakeEngines(answer=lambda _: Outcome(error="no"))
        gateway = Gateway.on(tmp_path / "j", engines)
        await gateway.accept("a")
        assert gateway.told == [("a", "start"), ("a", "completed")]

    run(test)


def test_what_an_engine_says_is_final(tmp_path: Path) -> None:
    async def test() -> None:
        engines = FakeEngines(answer=lambda _: Outcome(error="seed: too odd", logs="x\n"))
        gateway = Gateway.on(tmp_path / "j", engines)
        one = await gateway.accept("a")
        assert one.status == "failed"
        assert one.outcome == Outcome((), "seed: too odd", "x\n", {"attempts": 1})
        assert engines.asked == ["a"]
        gateway.assert_nothing_is_left()

    run(test)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GenerationError("the device is gone"), "the device is gone"),
        (KeyError("a cat"), "the gateway could not give it to an engine (KeyError)"),
    ],
)
def test_what_breaks_on_the_way_is_not_tried_again(
    error: Exception, said: str, tmp_path: Path
) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        one = await gateway.accept("a")
        gateway.engines.fail("a", error)
        await settled()
        assert one.status == "failed"
        assert one.outcome is not None
        assert one.outcome.error is not None
        assert one.outcome.error.startswith(said)
        assert "a cat" not in one.outcome.error
        assert gateway.engines.asked == ["a"]
        gateway.assert_nothing_is_left()

    run(test)


def test_work_is_sent_in_order_and_as_much_as_the_engines_have_room_for(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(2, each=1, is_held=True))
        await gateway.accept_all("abcd")
        assert gateway.engines.asked == ["a", "b"]
        assert (gateway.predictions.num_queued, gateway.predictions.num_under_way) == (2, 4)
        await gateway.finish("b")
        assert gateway.engines.asked == ["a", "b", "c"]
        await gateway.finish("a", "c", "d")
        assert gateway.engines.asked == ["a", "b", "c", "d"]
        gateway.assert_nothing_is_left()

    run(test)


def test_what_a_dead_engine_had_goes_before_all_that_came_later(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(2, each=2, is_held=True))
        ones = await gateway.accept_all("abcdef")
        assert gateway.engines.asked == ["a", "b", "c", "d"]
        started_at = ones[0].started_at
        await gateway.kill(0)  # it had a and c
        assert ones[0].started_at == started_at
        assert gateway.engines.asked[4:] == ["a", "c"]
        assert [one.status for one in ones] == ["processing"] * 4 + ["starting"] * 2
        await gateway.finish(*"abcdef")
        assert [one.num_attempts for one in ones] == [2, 1, 2, 1, 1, 1]
        assert ones[0].outcome is not None
        assert ones[0].outcome.metrics["attempts"] == 2
        assert gateway.told.count(("a", "start")) == 1
        assert gateway.predictions.attempts == {"new": 6, "engine_died": 2}
        gateway.assert_nothing_is_left()

    run(test)


def test_the_same_work_is_done_again(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        await gateway.accept("a", seed=5)
        await gateway.kill()
        first, second = gateway.engines.works
        assert first == second
        await gateway.finish("a")

    run(test)


def test_an_engine_that_cancels_by_itself_counts_as_dead(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        one = await gateway.accept("a")
        gateway.engines.under_way["a"].cancel()
        await settled()
        assert (one.status, one.num_attempts) == ("processing", 2)
        await gateway.finish("a")
        assert one.status == "succeeded"

    run(test)


def test_the_third_try_is_made_alone_and_before_all_others(tmp_path: Path) -> None:
    async def test() -> None:
        engines = FakeEngines(2, each=2, is_held=True)
        gateway = Gateway.on(tmp_path / "j", engines)
        await gateway.accept_all("abcde")
        for _ in range(2):
            await gateway.kill(0)
        # a and c are suspects now. Nothing new goes out until b and d are through.
        assert set(engines.under_way) == {"b", "d"}
        await gateway.finish("b")
        assert set(engines.under_way) == {"d"}
        assert len(gateway.predictions._line) == gateway.predictions.num_queued == 3
        await gateway.finish("d")
        assert set(engines.under_way) == {"a"}
        await gateway.accept("f")
        assert set(engines.under_way) == {"a"}
        await gateway.finish("a")
        assert set(engines.under_way) == {"c"}
        await gateway.finish("c")
        assert set(engines.under_way) == {"e", "f"}
        await gateway.finish("e", "f")
        assert gateway.predictions.attempts == {"new": 6, "engine_died": 2, "alone": 2}
        gateway.assert_nothing_is_left()

    run(test)


def test_three_deaths_are_the_end(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        one = await gateway.accept("a")
        for _ in range(3):
            await gateway.kill()
        assert (one.status, one.num_attempts) == ("failed", 3)
        assert one.outcome is not None
        assert one.outcome.error is not None
        assert "each of 3 tries" in one.outcome.error
        assert one.outcome.metrics == {"attempts": 3}
        gateway.assert_nothing_is_left()

    run(test)


@pytest.mark.parametrize("num_engines", [1, 2])
@pytest.mark.parametrize("is_journaled", [False, True])
def test_a_query_of_death_fails_alone(num_engines: int, is_journaled: bool, tmp_path: Path) -> None:
    async def test() -> None:
        engines = FakeEngines(num_engines, killers=["die"])
        gateway = Gateway.on(tmp_path / "j", engines)
        ones = [
            prediction(str(i), "die" if i == 13 else "live", seed=i, is_journaled=is_journaled)
            for i in range(32)
        ]
        await asyncio.gather(*map(gateway.predictions.accept, ones))
        await gateway.predictions.drain()
        await settled()
        assert engines.num_deaths == 3
        assert [one.id for one in ones if one.status != "succeeded"] == ["13"]
        assert [one.outcome and one.outcome.outputs for one in ones if one.id != "13"] == [
            answer_to(work(one.id, "live", int(one.id))).outputs for one in ones if one.id != "13"
        ]
        assert max(one.num_attempts for one in ones) == 3
        gateway.assert_nothing_is_left()

    run(test)


def test_two_queries_of_death_convict_nobody_else(tmp_path: Path) -> None:
    async def test() -> None:
        engines = FakeEngines(2, each=4, killers=["die"])
        gateway = Gateway.on(tmp_path / "j", engines)
        ones = [prediction(str(i), "die" if i in (2, 9) else "live") for i in range(16)]
        for one in ones:
            await gateway.predictions.accept(one)
        await gateway.predictions.drain()
        await settled()
        assert [one.id for one in ones if one.status == "failed"] == ["2", "9"]
        assert engines.num_deaths <= 6
        gateway.assert_nothing_is_left()

    run(test)


def test_what_waits_is_cancelled_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(each=1, is_held=True))
        _, one, other = await gateway.accept_all("abc")
        assert gateway.predictions.cancel("b")
        assert gateway.predictions.num_queued == 1
        await settled()
        assert (one.status, one.started_at, one.num_attempts) == ("canceled", None, 0)
        assert one.ended.is_set()
        assert one.outcome is not None
        assert one.outcome.error is None
        await gateway.finish("a", "c")
        assert other.status == "succeeded"
        assert gateway.engines.asked == ["a", "c"]
        assert gateway.predictions.ended == {("cog", "succeeded"): 2, ("cog", "canceled"): 1}
        gateway.assert_nothing_is_left()

    run(test)


def test_what_runs_is_cancelled_where_it_runs(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(each=1, is_held=True))
        one, _ = await gateway.accept_all("ab")
        assert gateway.predictions.cancel("a")
        assert gateway.predictions.cancel("a")  # twice is as good as once
        await settled()
        assert gateway.engines.cancelled == ["a"]
        assert (one.status, one.num_attempts) == ("canceled", 1)
        assert gateway.engines.asked == ["a", "b"]
        await gateway.finish("b")
        gateway.assert_nothing_is_left()

    run(test)


def test_what_is_just_being_sent_is_cancelled(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        for num_turns in range(4):
            one = prediction(f"a{num_turns}")
            await gateway.predictions.accept(one)
            await settled(num_turns)
            assert gateway.predictions.cancel(one.id)
            await settled()
            assert one.status == "canceled"
        gateway.assert_nothing_is_left()

    run(test)


def test_what_is_being_written_for_the_first_time_is_cancelled(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")
        one = prediction("a", is_journaled=True)
        accepting = asyncio.create_task(gateway.predictions.accept(one))
        await asyncio.sleep(0)
        assert gateway.predictions.num_queued == 1
        assert gateway.predictions.cancel("a")
        await accepting
        await gateway.predictions.wait(one, None)
        assert one.status == "canceled"
        assert gateway.engines.asked == []
        assert gateway.predictions.find("a").status == "canceled"  # type: ignore[union-attr]
        await settled()
        gateway.assert_nothing_is_left()

    run(test)


def test_what_is_over_unknown_or_being_written_is_not_cancelled(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        assert not gateway.predictions.cancel("a")
        one = prediction("a", is_journaled=True)
        await gateway.predictions.accept(one)
        await gateway.has_sent("a")
        await gateway.finish("a")
        assert gateway.predictions.is_under_way("a")
        assert not gateway.predictions.cancel("a")  # its outputs are on their way to the disk
        await gateway.predictions.wait(one, None)
        assert one.status == "succeeded"
        assert not gateway.predictions.cancel("a")

    run(test)


@pytest.mark.parametrize("error", [None, EngineDiedError("gone"), KeyError("x")])
def test_a_cancellation_wins_over_all_that_happens_with_it(
    error: Exception | None, tmp_path: Path
) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        one = await gateway.accept("a")
        if error is None:
            gateway.engines.finish("a")
        else:
            gateway.engines.fail("a", error)
        assert gateway.predictions.cancel("a")
        await settled()
        assert one.status == "canceled"
        assert gateway.engines.asked == ["a"]
        gateway.assert_nothing_is_left()

    run(test)


def test_an_engine_that_finishes_in_spite_of_a_cancellation_is_not_heard(tmp_path: Path) -> None:
    class Stubborn(FakeEngines):
        async def run(self, work: Work) -> Outcome:
            try:
                return await super().run(work)
            except asyncio.CancelledError:
                return answer_to(work)

    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", Stubborn(is_held=True))
        one = await gateway.accept("a")
        gateway.predictions.cancel("a")
        await settled()
        assert one.status == "canceled"
        gateway.assert_nothing_is_left()

    run(test)


def test_a_cancellation_is_not_hurried_and_not_overruled(tmp_path: Path) -> None:
    is_done, hurried = asyncio.Event(), []

    class Slow(FakeEngines):
        async def run(self, work: Work) -> Outcome:
            try:
                return await super().run(work)
            except asyncio.CancelledError:
                try:
                    await is_done.wait()  # as a message to another machine may take
                except asyncio.CancelledError:
                    hurried.append(work.id)
                raise

    async def test() -> None:
        clock = Clock()
        gateway = Gateway.on(tmp_path / "j", Slow(is_held=True))
        one = await gateway.accept("a")
        gateway.predictions.cancel("a")
        await settled()
        assert gateway.predictions.cancel("a")
        await clock.advance(10_000)  # the deadline comes too late
        is_done.set()
        await settled()
        assert hurried == []
        assert one.status == "canceled"
        gateway.assert_nothing_is_left()

    run(test)


def test_others_go_on_when_the_suspect_that_they_wait_for_is_cancelled(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(2, each=1, is_held=True))
        await gateway.accept_all("abc")
        await gateway.kill(0)
        await gateway.kill(0)
        assert set(gateway.engines.under_way) == {"b"}
        gateway.predictions.cancel("a")
        await settled()
        assert set(gateway.engines.under_way) == {"b", "c"}
        await gateway.finish("b", "c")
        gateway.assert_nothing_is_left()

    run(test)


def test_others_go_on_when_the_suspect_that_runs_is_cancelled(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(2, each=1, is_held=True))
        await gateway.accept_all("a")
        await gateway.kill(0)
        await gateway.kill(0)
        await gateway.accept_all("bc")
        assert set(gateway.engines.under_way) == {"a"}
        gateway.predictions.cancel("a")
        await settled()
        assert set(gateway.engines.under_way) == {"b", "c"}
        await gateway.finish("b", "c")
        gateway.assert_nothing_is_left()

    run(test)


@pytest.mark.parametrize("max_queued", [0, 1, 3])
def test_no_more_wait_than_may(max_queued: int, tmp_path: Path) -> None:
    async def test() -> None:
        engines = FakeEngines(each=2, is_held=True)
        gateway = Gateway.on(tmp_path / "j", engines, max_queued=max_queued)
        for i in range(2 + max_queued):
            await gateway.predictions.accept(prediction(str(i)))  # none has been sent by then
        with pytest.raises(QueueFullError) as full:
            await gateway.accept("x")
        assert full.value.retry_after_s == 1
        assert gateway.predictions.is_full
        assert not gateway.predictions.is_under_way("x")
        await settled()
        await gateway.finish("0")
        assert not gateway.predictions.is_full
        await gateway.accept("y")
        with pytest.raises(QueueFullError):
            await gateway.accept("x")
        await gateway.finish(*(str(i) for i in range(1, 2 + max_queued)), "y")
        gateway.assert_nothing_is_left()

    run(test)


def test_those_that_are_being_written_count_as_waiting(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(each=1), max_queued=2)
        ones = [prediction(str(i), is_journaled=True) for i in range(8)]
        results = await asyncio.gather(
            *map(gateway.predictions.accept, ones), return_exceptions=True
        )
        assert [type(each) for each in results] == [type(None)] * 3 + [QueueFullError] * 5
        await gateway.predictions.drain()

    run(test)


def test_nothing_is_refused_that_a_dead_engine_gave_back(tmp_path: Path) -> None:
    async def test() -> None:
        engines = FakeEngines(2, each=2, is_held=True)
        gateway = Gateway.on(tmp_path / "j", engines, max_queued=1)
        ones = await gateway.accept_all("abcde")
        engines.num_ready, engines.capacity = 1, 2  # as if one engine were not back yet
        await gateway.kill(0)
        assert gateway.predictions.num_queued == 3
        with pytest.raises(QueueFullError):
            await gateway.accept("x")
        await gateway.finish(*"bdace")
        assert {one.status for one in ones} == {"succeeded"}
        gateway.assert_nothing_is_left()

    run(test)


def test_a_full_queue_says_when_a_tenth_of_it_may_be_through(tmp_path: Path) -> None:
    async def test() -> None:
        clock = Clock()
        gateway = Gateway.on(tmp_path / "j", FakeEngines(each=1, is_held=True), max_queued=20)
        for i in range(21):
            await gateway.accept(str(i))
        for i in range(8):
            await gateway.finish(str(i))
            await clock.advance(4)
            await gateway.accept(f"new{i}")
        with pytest.raises(QueueFullError, match="try again in 8 seconds") as full:
            await gateway.accept("x")
        assert full.value.retry_after_s == 8
        await clock.advance(800)
        with pytest.raises(QueueFullError) as full:
            await gateway.accept("x")
        assert full.value.retry_after_s == 60

    run(test)


def test_two_of_one_id_are_not_under_way_together(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        first = await gateway.accept("a")
        with pytest.raises(IdInUseError, match="the id a is under way"):
            await gateway.accept("a")
        await gateway.finish("a")
        second = await gateway.accept("a")
        await gateway.finish("a")
        assert (first.status, second.status) == ("succeeded", "succeeded")
        gateway.assert_nothing_is_left()

    run(test)


def test_drain_refuses_new_ones_and_waits_for_all_others(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(each=1, is_held=True))
        ones = await gateway.accept_all("ab")
        draining = asyncio.create_task(gateway.predictions.drain())
        await settled()
        assert gateway.predictions.is_draining
        with pytest.raises(DrainingError):
            await gateway.accept("c")
        await gateway.kill()
        await gateway.finish("a")
        assert not draining.done()
        await gateway.finish("b")
        assert draining.done()
        assert [one.status for one in ones] == ["succeeded"] * 2
        await gateway.predictions.drain()  # at once, where nothing is under way
        gateway.assert_nothing_is_left()

    run(test)


def test_drain_waits_for_what_is_being_written(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")
        one = prediction("a", is_journaled=True)
        accepting = asyncio.create_task(gateway.predictions.accept(one))
        await asyncio.sleep(0)
        await gateway.predictions.drain()
        assert one.status == "succeeded"
        await accepting

    run(test)


def test_a_gateway_that_stops_leaves_what_is_under_way_to_the_next(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(each=4, is_held=True))
        ones = [prediction(id, is_journaled=True) for id in "abcdef"]
        for one in ones:
            await gateway.predictions.accept(one)
        await gateway.has_sent("d")
        gateway.engines.finish("c")
        draining = asyncio.create_task(gateway.predictions.drain())
        await settled(3)
        gateway.predictions.cancel("b")
        gateway.predictions.cancel("f")
        # As their end may look like, when they are closed: nobody is tried again for it.
        asyncio.get_running_loop().call_soon(gateway.engines.kill)
        await gateway.predictions.stop()
        await draining
        status = [one.status for one in ones]
        assert status == [
            "processing", "canceled", "succeeded", "processing", "starting", "canceled",
        ]  # fmt: skip
        assert sorted(gateway.engines.cancelled) == ["a", "b", "d"]
        assert gateway.engines.asked == ["a", "b", "c", "d"]
        left = gateway.journal.unfinished()
        assert [(each.prediction.id, each.prediction.num_attempts) for each in left] == [
            ("a", 1),
            ("d", 1),
            ("e", 0),
        ]
        with pytest.raises(DrainingError):
            await gateway.accept("g")
        await settled()
        assert len(asyncio.all_tasks()) == 1

    run(test)


def test_a_gateway_with_nothing_under_way_stops_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")
        await gateway.predictions.stop()
        gateway.assert_nothing_is_left()

    run(test)


def test_a_prediction_that_waits_too_long_fails(tmp_path: Path) -> None:
    async def test() -> None:
        clock = Clock()
        gateway = Gateway.on(
            tmp_path / "j", FakeEngines(0), queue_timeout_s=30.0, run_timeout_s=60.0
        )
        one = await gateway.accept("a")
        await clock.advance(89)
        assert one.status == "starting"
        await clock.advance(2)
        assert one.status == "failed"
        assert one.outcome is not None
        assert one.outcome.error == (
            "it was not done within DMD2_QUEUE_TIMEOUT_S and DMD2_RUN_TIMEOUT_S together, which "
            "are 90 s; it was given to an engine 0 times, and no engine is ready now"
        )
        gateway.assert_nothing_is_left()

    run(test)


def test_a_prediction_that_runs_too_long_fails_and_is_cancelled_where_it_runs(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        clock = Clock()
        engines = FakeEngines(is_held=True)
        gateway = Gateway.on(tmp_path / "j", engines, queue_timeout_s=30.0, run_timeout_s=60.0)
        one = await gateway.accept("a")
        await clock.advance(50)
        await gateway.kill()
        await clock.advance(41)  # all tries count together
        assert one.status == "failed"
        assert one.outcome is not None
        assert one.outcome.error is not None
        assert one.outcome.error.endswith("given to an engine 2 times")
        assert engines.cancelled == ["a"]
        gateway.assert_nothing_is_left()

    run(test)


def test_a_deadline_does_not_come_after_the_end(tmp_path: Path) -> None:
    async def test() -> None:
        clock = Clock()
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        one = await gateway.accept("a")
        await gateway.finish("a")
        await clock.advance(10_000)
        assert one.status == "succeeded"
        assert gateway.told.count(("a", "completed")) == 1

    run(test)


def test_what_waits_is_sent_when_an_engine_becomes_ready(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(0, each=2, is_held=True))
        await gateway.accept_all("abcde")
        assert gateway.engines.asked == []
        gateway.engines.set_ready(1)
        await settled()
        assert gateway.engines.asked == ["a", "b"]
        gateway.engines.set_ready(2)  # nobody has to finish for that
        await settled()
        assert gateway.engines.asked == ["a", "b", "c", "d"]
        await gateway.finish(*"abcde")
        gateway.assert_nothing_is_left()

    run(test)


def test_a_suspect_waits_for_an_engine_to_be_ready(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        one = await gateway.accept("a")
        await gateway.kill()
        gateway.engines.capacity = 0
        await gateway.kill()
        assert gateway.engines.asked == ["a", "a"]
        gateway.engines.set_ready(1)
        await settled()
        await gateway.finish("a")
        assert (one.status, one.num_attempts) == ("succeeded", 3)
        gateway.assert_nothing_is_left()

    run(test)


def test_wait_returns_at_the_end_or_when_its_time_is_up(tmp_path: Path) -> None:
    async def test() -> None:
        clock = Clock()
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        one = await gateway.accept("a")
        waits = [
            asyncio.create_task(gateway.predictions.wait(one, timeout_s))
            for timeout_s in (5, 60, None)
        ]
        await settled()
        await clock.advance(6)
        assert [each.done() for each in waits] == [True, False, False]
        assert one.status == "processing"
        await gateway.finish("a")
        assert [each.done() for each in waits] == [True] * 3
        await asyncio.gather(*waits)
        await gateway.predictions.wait(one, None)

    run(test)


def test_nobody_who_listens_can_hold_up_what_runs(tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no")

    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")
        gateway.predictions._tell = broken
        one = await gateway.accept("a")
        assert one.status == "succeeded"
        gateway.assert_nothing_is_left()

    run(test)


def test_what_is_over_is_forgotten(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")
        ones = [prediction(str(i), is_journaled=i % 2 == 0) for i in range(8)]
        refs = [weakref.ref(one) for one in ones]
        await asyncio.gather(*map(gateway.predictions.accept, ones))
        await gateway.predictions.drain()
        await settled()
        del ones
        gc.collect()
        assert [ref() for ref in refs] == [None] * 8
        gateway.assert_nothing_is_left()

    run(test)


def test_a_gateway_that_is_stopped_ends_nothing_and_sends_nothing_more(tmp_path: Path) -> None:
    gateways = []

    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(each=1, is_held=True))
        gateways.append(gateway)
        gateway.ones = [prediction(id, is_journaled=True) for id in "ab"]  # type: ignore[attr-defined]
        for one in gateway.ones:  # type: ignore[attr-defined]
            await gateway.predictions.accept(one)
        await gateway.has_sent("a")

    run(test)  # cancels what is left, as the end of a process' loop does
    (gateway,) = gateways
    assert gateway.engines.asked == ["a"]
    assert [one.status for one in gateway.ones] == ["processing", "starting"]
    journal = Journal(tmp_path / "j")
    left = [(each.prediction.id, each.prediction.num_attempts) for each in journal.unfinished()]
    assert left == [("a", 1), ("b", 0)]
    journal.close()


def test_neither_torch_nor_a_web_framework_is_needed() -> None:
    code = (
        "import sys, deploy.gateway.life.predictions; "
        "sys.exit(bool({'torch', 'ray', 'starlette', 'cog'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
