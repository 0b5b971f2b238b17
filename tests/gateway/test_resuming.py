"""What a gateway that was killed leaves, and what the next one makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gateway.fake_engines import CARD, FakeEngines, answer_to, prediction, settled, work
from gateway.gateways import Gateway, run

from deploy.gateway.keeping.journal_file import JournalError
from deploy.gateway.keeping.outputs import OutputsError
from deploy.gateway.life.life import End
from deploy.gateway.prediction import Prediction
from deploy.gateway.work import Outcome

Step = Callable[[Gateway], Coroutine[Any, Any, None]]


async def before_it_is_sent(gateway: Gateway) -> None:
    gateway.engines.set_ready(0)
    await gateway.predictions.accept(prediction("a", is_journaled=True, num_outputs=2))


async def while_an_engine_has_it(gateway: Gateway) -> None:
    await gateway.predictions.accept(prediction("a", is_journaled=True, num_outputs=2))
    await gateway.has_sent("a")


async def between_its_outputs_and_its_end(gateway: Gateway) -> None:
    is_there = asyncio.Event()

    async def never(_: Prediction) -> None:
        is_there.set()
        await asyncio.Event().wait()

    gateway.journal.finished = never  # type: ignore[method-assign]
    await while_an_engine_has_it(gateway)
    gateway.engines.finish("a")
    await is_there.wait()
    assert len(list((gateway.folder / "outputs").iterdir())) == 2


@pytest.mark.parametrize(
    ("step", "num_attempts"),
    [
        (before_it_is_sent, 1),
        (while_an_engine_has_it, 2),
        (between_its_outputs_and_its_end, 2),
    ],
)
def test_what_was_accepted_is_done_by_the_next_gateway(
    step: Step, num_attempts: int, tmp_path: Path
) -> None:
    async def test() -> None:
        first = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        await step(first)
        left = first.predictions.find("a")
        second = Gateway.on(first.as_after_a_kill(), FakeEngines())
        await second.predictions.resume()
        one = second.predictions.find("a")
        assert left is not None
        assert one is not None
        assert second.predictions.is_under_way("a")
        assert (one.status, one.started_at) == (left.status, left.started_at)
        await second.predictions.wait(one, None)
        said = answer_to(work("a", num_outputs=2))
        assert one.status == "succeeded"
        assert one.outcome is not None
        assert one.outcome.outputs == said.outputs
        assert one.outcome.metrics == {**said.metrics, "attempts": num_attempts}
        assert (one.created_at, one.inputs) == (left.created_at, left.inputs)
        again = second.predictions.find("a")
        assert again is not None
        assert await second.journal.outputs.of(again) == said.outputs
        assert len(list((second.folder / "outputs").iterdir())) == 2  # nothing that nobody names
        assert second.predictions.attempts == {"resumed": 1}
        was_started = ("a", "start") in first.told
        assert [event for _, event in second.told] == ([] if was_started else ["start"]) + [
            "output",
            "logs",
            "completed",
        ]
        assert (second.predictions.num_queued, second.predictions.num_under_way) == (0, 0)

    run(test)


def test_what_is_over_is_not_done_again(tmp_path: Path) -> None:
    async def test() -> None:
        first = Gateway.on(tmp_path / "j", FakeEngines())
        one = prediction("a", is_journaled=True)
        await first.predictions.accept(one)
        await first.predictions.wait(one, None)
        second = Gateway.on(first.as_after_a_kill())
        await second.predictions.resume()
        await settled()
        assert second.engines.asked == []
        assert second.predictions.find("a").status == "succeeded"  # type: ignore[union-attr]

    run(test)


def test_what_is_not_journaled_is_gone(tmp_path: Path) -> None:
    async def test() -> None:
        first = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        await first.accept("a")
        second = Gateway.on(first.as_after_a_kill())
        await second.predictions.resume()
        assert second.predictions.find("a") is None

    run(test)


def test_what_is_resumed_goes_in_its_old_order_and_before_what_is_new(tmp_path: Path) -> None:
    async def test() -> None:
        first = Gateway.on(tmp_path / "j", FakeEngines(0))
        for id in "cab":
            await first.predictions.accept(prediction(id, is_journaled=True))
        second = Gateway.on(first.as_after_a_kill(), FakeEngines(0, each=1), max_queued=4)
        await second.predictions.resume()
        assert second.predictions.num_queued == 3
        await second.accept("new")
        second.engines.set_ready(1)
        await second.predictions.drain()
        assert second.engines.asked == ["c", "a", "b", "new"]

    run(test)


def test_a_request_that_kills_the_gateway_itself_does_so_three_times(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(is_held=True))
        await gateway.predictions.accept(prediction("a", is_journaled=True))
        await gateway.predictions.accept(prediction("b", is_journaled=True))
        for death in (1, 2):
            await gateway.has_sent("a")
            await gateway.has_sent("b")
            gateway = Gateway.on(gateway.as_after_a_kill(), FakeEngines(is_held=True))
            await gateway.predictions.resume()
            assert gateway.predictions.find("a").num_attempts == death  # type: ignore[union-attr]
        await gateway.has_sent("a")
        assert set(gateway.engines.under_way) == {"a"}  # alone
        last = Gateway.on(gateway.as_after_a_kill(), FakeEngines())
        await last.predictions.resume()
        one = last.predictions.find("a")
        assert one is not None
        await last.predictions.drain()
        assert one.status == "failed"
        assert one.outcome is not None
        assert one.outcome.error is not None
        assert "each of 3 tries" in one.outcome.error
        assert last.engines.asked == ["b"]
        assert last.predictions.find("b").status == "succeeded"  # type: ignore[union-attr]

    run(test)


def test_where_no_request_can_end_the_gateway_its_ends_are_no_tries(tmp_path: Path) -> None:
    """Those of engines are, those before its end too."""

    def engines() -> FakeEngines:
        return FakeEngines(is_held=True, is_in_process=False)

    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", engines())
        for id in "ab":
            await gateway.predictions.accept(prediction(id, is_journaled=True))
        for _ in range(4):
            await gateway.has_sent("a")
            await gateway.has_sent("b")  # beside it
            gateway = Gateway.on(gateway.as_after_a_kill(), engines())
            await gateway.predictions.resume()
        for death in (1, 2):
            await gateway.has_sent("a", death)
            await gateway.has_sent("b", death)
            await gateway.kill()
        await gateway.has_sent("a", 3)
        assert set(gateway.engines.under_way) == {"a"}  # alone
        last = Gateway.on(gateway.as_after_a_kill(), engines())
        await last.predictions.resume()
        await last.has_sent("a")
        assert set(last.engines.under_way) == {"a"}  # still
        one = last.predictions.find("a")
        assert one is not None
        await last.kill()
        await last.predictions.wait(one, None)
        assert (one.status, one.num_attempts) == ("failed", 3)
        await last.has_sent("b")
        await last.finish("b")
        await last.predictions.drain()
        assert last.predictions.find("b").status == "succeeded"  # type: ignore[union-attr]

    run(test)


def test_a_try_that_cannot_be_written_is_made_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")

        async def full(*_: object) -> None:
            raise JournalError("the journal cannot be written: database or disk is full")

        gateway.journal.tried = full  # type: ignore[method-assign]
        one = prediction("a", is_journaled=True)
        await gateway.predictions.accept(one)
        await gateway.predictions.wait(one, None)
        assert (one.status, one.num_attempts) == ("succeeded", 1)
        assert gateway.told[0] == ("a", "start")

    run(test)
    assert "a try of prediction a is not in the journal: " in caplog.text


@pytest.mark.parametrize(
    "inputs",
    [
        {"lora_weights": "me/private", "hf_api_token": "hf_s3cr3t"},
        {"lora_weights": "https://x.org/a.safetensors?key=s3cr3t"},
        {"lora_weights": "me/open", "extra_lora": "https://me:s3cr3t@x.org/a.safetensors"},
    ],
)
def test_what_needs_a_secret_fails_at_once_and_says_so(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    async def test() -> None:
        first = Gateway.on(tmp_path / "j", FakeEngines(0))
        await first.predictions.accept(prediction("a", is_journaled=True, **inputs))
        folder = first.as_after_a_kill()
        second = Gateway.on(folder, FakeEngines(0))
        await second.predictions.resume()
        one = second.predictions.find("a")
        assert one is not None
        await second.predictions.wait(one, None)
        assert one.status == "failed"
        assert one.outcome is not None
        assert "keeps no token" in str(one.outcome.error)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) >= 3
        assert not [path for path in files if b"s3cr3t" in path.read_bytes()]

    run(test)


def test_a_lora_without_a_secret_is_fetched_again(tmp_path: Path) -> None:
    async def test() -> None:
        first = Gateway.on(tmp_path / "j", FakeEngines(0))
        inputs = {"lora_weights": "me/open", "lora_scale": 0.5, "extra_lora": "me/too"}
        one = prediction("a", is_journaled=True, **inputs)
        await first.predictions.accept(one)
        second = Gateway.on(first.as_after_a_kill())
        await second.predictions.resume()
        await second.predictions.drain()
        assert second.engines.works == [one.work]

    run(test)


def test_work_for_another_model_is_not_done(tmp_path: Path) -> None:
    class OtherEngines(FakeEngines):
        async def card(self) -> Any:
            return replace(CARD, name="other")

    async def test() -> None:
        first = Gateway.on(tmp_path / "j", FakeEngines(0))
        await first.predictions.accept(prediction("a", is_journaled=True))
        second = Gateway.on(first.as_after_a_kill(), OtherEngines())
        await second.predictions.resume()
        one = second.predictions.find("a")
        assert one is not None
        await second.predictions.drain()
        assert one.status == "failed"
        assert one.outcome is not None
        assert "for the model fake" in str(one.outcome.error)
        assert second.engines.asked == []

    run(test)


def test_what_waits_for_the_model_is_cancelled_at_once(tmp_path: Path) -> None:
    class NeverReady(FakeEngines):
        async def card(self) -> Any:
            await asyncio.Event().wait()

    async def test() -> None:
        first = Gateway.on(tmp_path / "j", FakeEngines(0))
        await first.predictions.accept(prediction("a", is_journaled=True))
        second = Gateway.on(first.as_after_a_kill(), NeverReady())
        await second.predictions.resume()
        await settled()
        one = second.predictions.find("a")
        assert one is not None
        second.predictions.cancel("a")
        await second.predictions.wait(one, None)
        assert (one.status, one.num_attempts) == ("canceled", 0)

    run(test)


def test_what_cannot_be_written_is_not_accepted(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")

        async def full(_: Prediction) -> None:
            raise JournalError("the journal cannot be written: database or disk is full")

        gateway.journal.accepted = full  # type: ignore[method-assign]
        with pytest.raises(JournalError, match="disk is full"):
            await gateway.predictions.accept(prediction("a", is_journaled=True))
        assert gateway.predictions.find("a") is None
        await settled()
        assert gateway.engines.asked == []
        gateway.assert_nothing_is_left()

    run(test)


def test_an_end_that_comes_at_once_is_written_with_its_prediction(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")

        async def never(_: Prediction) -> None:
            await asyncio.Event().wait()

        gateway.journal.finished = never  # type: ignore[method-assign]
        one = prediction("a", is_journaled=True)
        one.work = None
        await gateway.predictions.accept(one, End.of(Outcome(error="too wide")))
        second = Gateway.on(gateway.as_after_a_kill())
        await second.predictions.resume()
        found = second.predictions.find("a")
        assert found is not None
        assert (found.status, found.inputs) == ("failed", one.inputs)
        assert found.outcome == Outcome(error="too wide", metrics={"attempts": 0})
        assert not second.predictions.is_under_way("a")

    run(test)


def test_an_id_is_free_of_its_older_prediction_before_an_engine_has_the_newer(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")
        one = prediction("a", is_journaled=True)
        await gateway.predictions.accept(one)
        await gateway.predictions.wait(one, None)
        gateway.engines.is_held = True
        await gateway.accept("a", prompt="newer")
        second = Gateway.on(gateway.as_after_a_kill())
        assert second.predictions.find("a") is None
        assert list((second.folder / "outputs").iterdir()) == []
        await gateway.finish("a")
        assert gateway.predictions.find("a") is None
        gateway.assert_nothing_is_left()

    run(test)


@pytest.mark.parametrize("is_journaled", [False, True])
def test_an_older_prediction_is_known_where_a_newer_of_its_id_is_not_accepted(
    is_journaled: bool, tmp_path: Path
) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")

        async def full(_: Prediction) -> None:
            raise JournalError("the journal cannot be written: database or disk is full")

        one = prediction("a", is_journaled=True)
        gateway.journal.finished = full  # type: ignore[method-assign]
        await gateway.predictions.accept(one)
        await gateway.predictions.wait(one, None)
        gateway.journal.accepted = full  # type: ignore[method-assign]
        with pytest.raises(JournalError, match="disk is full"):
            await gateway.predictions.accept(prediction("a", is_journaled=is_journaled))
        known = gateway.predictions.find("a")
        assert known is not None
        assert (known.status, known.created_at) == ("succeeded", one.created_at)
        gateway.assert_nothing_is_left()

    run(test)


def test_outputs_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")

        async def full(_: object) -> tuple[str, ...]:
            raise OutputsError("the outputs could not be kept: No space left on device")

        gateway.journal.outputs.keep = full  # type: ignore[method-assign, assignment]
        one = prediction("a", is_journaled=True)
        await gateway.predictions.accept(one)
        await gateway.predictions.wait(one, None)
        for each in (one, gateway.predictions.find("a")):
            assert each is not None
            assert each.status == "failed"
            assert each.outcome is not None
            assert each.outcome.error == "the outputs could not be kept: No space left on device"
            assert (each.outcome.outputs, each.files) == ((), ())
            assert each.outcome.metrics["seeds"] == [7]
        await settled()
        gateway.assert_nothing_is_left()

    run(test)


def test_an_end_that_cannot_be_written_is_known_here_and_comes_again_elsewhere(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")

        async def full(_: Prediction) -> None:
            raise JournalError("the journal cannot be written: database or disk is full")

        gateway.journal.finished = full  # type: ignore[method-assign]
        one = prediction("a", is_journaled=True)
        await gateway.predictions.accept(one)
        await gateway.predictions.wait(one, None)
        assert one.status == "succeeded"
        known = gateway.predictions.find("a")
        (listed,), _, _ = gateway.predictions.page(None)
        assert known is listed
        assert known is not None
        assert known.status == "succeeded"
        assert known.outcome is not None
        assert known.outcome.outputs == ()  # they are in files
        assert await gateway.journal.outputs.of(known) == answer_to(work("a")).outputs
        await settled()
        gateway.assert_nothing_is_left()
        second = Gateway.on(gateway.as_after_a_kill())
        await second.predictions.resume()
        await second.predictions.drain()
        assert second.engines.asked == ["a"]

    run(test)


def test_an_end_that_could_not_be_written_gives_way_to_a_new_prediction(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")
        finished = gateway.journal.finished

        async def full(_: Prediction) -> None:
            raise JournalError("the journal cannot be written: database or disk is full")

        for write, prompt in ((full, "old"), (finished, "new")):
            gateway.journal.finished = write  # type: ignore[method-assign]
            one = prediction("a", prompt, is_journaled=True)
            await gateway.predictions.accept(one)
            await gateway.predictions.wait(one, None)
        known = gateway.predictions.find("a")
        assert known is not None
        assert known.inputs["prompt"] == "new"

    run(test)


def test_ends_that_cannot_be_written_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        monkeypatch.setattr("deploy.gateway.life.kept_ends.MAX_UNWRITTEN", 2)
        gateway = Gateway.on(tmp_path / "j", FakeEngines(each=1))

        async def full(_: Prediction) -> None:
            raise JournalError("the journal cannot be written: database or disk is full")

        gateway.journal.finished = full  # type: ignore[method-assign]
        for id in "abc":
            await gateway.predictions.accept(prediction(id, is_journaled=True))
        await gateway.predictions.drain()
        assert set(gateway.predictions._kept_ends._unwritten) == {"b", "c"}

    run(test)


def test_a_page_says_of_those_under_way_what_is_known_now(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j", FakeEngines(each=1, is_held=True))
        a, b = (prediction(id, is_journaled=True) for id in "ab")
        await gateway.predictions.accept(a)
        await gateway.predictions.accept(b)
        await gateway.accept("not journaled")
        assert [id(each) for each in gateway.predictions.page(None)[0]] == [id(b), id(a)]

    run(test)


def test_a_caller_who_leaves_while_it_is_written_has_had_it_accepted(tmp_path: Path) -> None:
    async def test() -> None:
        gateway = Gateway.on(tmp_path / "j")
        one = prediction("a", is_journaled=True)
        accepting = asyncio.create_task(gateway.predictions.accept(one))
        await asyncio.sleep(0)
        accepting.cancel()
        await gateway.predictions.wait(one, None)
        assert one.status == "succeeded"

    run(test)
