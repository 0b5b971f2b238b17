"""What webhooks may take: nobody is held up, and nothing grows."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from gateway.fake_engines import settled
from gateway.gateways import run
from gateway.webhook_world import (
    FAST,
    Taking,
    receiver,
    said,
    told,
    webhooks,
)

from deploy.gateway.hooks.webhooks import Webhooks
from deploy.gateway.prediction import Prediction
from deploy.gateway.work import Outcome


def test_a_receiver_that_is_slow_holds_up_nobody_else(tmp_path: Path) -> None:
    async def test() -> None:
        async def forever(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            await reader.read()

        pace = replace(FAST, at_once=2, max_waiting=4)
        async with receiver() as slow, receiver() as quick:
            hosts = [each.origin for each in (slow, quick)]
            async with webhooks(tmp_path / "j", *hosts, pace=pace) as w:
                slow.answering = forever
                for number in range(8):
                    w.tell(told(slow.url, f"s{number}", is_journaled=False), "start")
                await slow.has(2)
                assert w.counts == {("start", "dropped"): 4}
                for number in range(4):
                    w.tell(told(quick.url, f"q{number}"), "start")
                await quick.has(4)
                assert len(slow.posts) == 2  # as many at once, and no more
                assert w.counts["start", "delivered"] <= 4

    run(test)


def test_ends_for_which_there_is_no_room_are_told_later_from_the_journal(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiver() as hook:
            pace = replace(FAST, at_once=1, max_waiting=2)
            async with webhooks(tmp_path / "j", hook.origin, pace=pace) as w:
                url = hook.url.partition("?")[0]
                ended = [told(url, f"p{number}", ("start", "completed")) for number in range(7)]
                for one in ended:
                    await w._journal.accepted(one)
                    await w._journal.finished(replace(one, completed_at=one.created_at))
                for one in ended:
                    w.tell(one, "start")
                    w.tell(one, "completed")
                assert w.counts == {("start", "dropped"): 6}
                while w._journal.untold():
                    await asyncio.sleep(0.005)
                await settled()
                assert w.counts["completed", "delivered"] == 7
                assert w._lines == {}

    run(test)


async def ended(w: Webhooks, id: str) -> Prediction:
    """A prediction that is over, in the journal too, with nobody told."""
    one = told("https://hooks.test/", id, ("start", "completed"))
    await w._journal.accepted(one)
    await w._journal.finished(replace(one, completed_at=one.created_at))
    return one


def test_an_end_that_was_left_out_leaves_nothing_and_is_told_once_there_is_room(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        poster = Taking()
        poster.hold("a", "b", "c")
        pace = replace(FAST, max_waiting=3)
        async with webhooks(tmp_path / "j", "hooks.test", pace=pace, poster=poster) as w:
            one = await ended(w, "a")
            for each in (one, told("https://hooks.test/", "b"), told("https://hooks.test/", "c")):
                w.tell(each, "start")
            w.tell(one, "completed")  # for which there is no room
            await settled()
            poster.gates["a"].set()
            await settled()
            assert w.counts == {("start", "delivered"): 1}
            assert {id for id, _ in w._lines} == {"b", "c"}
            poster.gates["b"].set()  # now there is
            while w._journal.untold():
                await asyncio.sleep(0.002)
            assert [each["id"] for each in poster.bodies] == ["a", "b", "a"]
            poster.gates["c"].set()
            await settled()
            assert {id for id, _ in w._lines} == {"b", "c"}  # they have not come to their end

    run(test)


def test_an_end_that_the_journal_does_not_have_is_counted_as_dropped(tmp_path: Path) -> None:
    async def test() -> None:
        poster = Taking()
        pace = replace(FAST, max_waiting=0)
        async with webhooks(tmp_path / "j", "hooks.test", pace=pace, poster=poster) as w:
            w.tell(told("https://hooks.test/"), "completed")
            assert w.counts == {}
            w.tell(told("https://hooks.test/", "b", is_journaled=False), "completed")
            assert w.counts == {("completed", "dropped"): 1}
            assert w._lines == {}

    run(test)


def test_an_end_that_was_left_out_follows_a_start_that_is_on_its_way(tmp_path: Path) -> None:
    async def test() -> None:
        poster = Taking()
        poster.hold("a")
        pace = replace(FAST, max_waiting=2)
        async with webhooks(tmp_path / "j", "hooks.test", pace=pace, poster=poster) as w:
            one = await ended(w, "a")
            w.tell(one, "start")
            w.tell(told("https://hooks.test/", "b"), "start")
            w.tell(one, "completed")
            await settled()
            assert [each["id"] for each in poster.bodies] == ["b"]
            poster.gates["a"].set()
            while w._journal.untold():
                await asyncio.sleep(0.002)
            assert [each["id"] for each in poster.bodies] == ["b", "a", "a"]

    run(test)


def test_an_end_is_told_once_however_often_it_is_heard_of(tmp_path: Path) -> None:
    async def test() -> None:
        poster = Taking()
        poster.hold("a")
        async with webhooks(tmp_path / "j", "hooks.test", poster=poster) as w:
            one = await ended(w, "a")
            w.tell(one, "start")
            w.resume()  # before it is heard of: its own end will come
            assert [message.event for line in w._lines.values() for message in line.messages] == [
                "start"
            ]
            w.tell(one, "completed")
            w.resume()
            w.tell(one, "completed")
            poster.gates["a"].set()
            while w._journal.untold():
                await asyncio.sleep(0.002)
            await settled()
            assert len(poster.bodies) == 2

    run(test)


def test_outputs_in_memory_are_bounded(tmp_path: Path) -> None:
    async def test() -> None:
        pace = replace(FAST, max_bytes=1000)
        async with receiver() as hook, webhooks(tmp_path / "j", hook.origin, pace=pace) as w:
            outcome = Outcome(outputs=(bytes(600),))
            for id, files in (("a", ()), ("b", ()), ("c", ("x.png",))):
                one = told(hook.url, id, outcome=outcome, files=files, is_journaled=False)
                w.tell(one, "completed")
            await w.drain(1)
            assert sorted(each["id"] for each in hook.bodies) == ["a", "c"]
            assert w.counts["completed", "dropped"] == 1
            assert w._lines == {}
            w.tell(told(hook.url, "d", outcome=outcome, is_journaled=False), "completed")
            assert w._lines  # there is room again

    run(test)


def test_a_body_that_cannot_be_made_does_not_end_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async def broken(one: Prediction) -> bytes:
            if one.status == "processing":
                raise KeyError("x")
            return await said(one)

        async with (
            receiver() as hook,
            webhooks(tmp_path / "j", hook.origin) as w,
        ):
            w._bodies = {"replicate": broken}
            one = told(hook.url, status="processing")
            w.tell(one, "start")
            one.status = "succeeded"
            w.tell(one, "completed")
            await w.drain(1)
            assert [each["status"] for each in hook.bodies] == ["succeeded"]

    with caplog.at_level(logging.ERROR):
        run(test)
    assert "KeyError" in caplog.text
