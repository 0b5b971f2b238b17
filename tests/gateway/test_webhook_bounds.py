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
    receiver,
    said,
    told,
    webhooks,
)

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
