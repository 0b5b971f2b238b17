"""Webhooks: what is sent, in what order, and how often."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from gateway.fake_engines import FakeEngines, settled
from gateway.gateways import Clock, run
from gateway.v1_world import world
from gateway.webhook_world import (
    FAST,
    Taking,
    receiver,
    told,
    webhooks,
)

from deploy.gateway.hooks.webhook_messages import Pace
from deploy.gateway.prediction import EVENTS


def test_each_event_is_a_signed_post_of_the_dialects_own_body(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            receiver() as hook,
            world(tmp_path / "j", FakeEngines(), webhook_hosts=(hook.origin,)) as one,
        ):
            body = {
                "input": {"prompt": "a cat"},
                "webhook": hook.url,
                "webhook_events_filter": list(EVENTS),
            }
            response = await one.post("/v1/models/a/b/predictions", body, Prefer="wait")
            await hook.has(3)
            await one.webhooks.drain(1)
            assert [each["status"] for each in hook.bodies] == ["processing", *["succeeded"] * 2]
            polled = await one.get(f"/v1/predictions/{response.json()['id']}")
            path = polled["urls"]["get"].removeprefix("http://gate:5000")
            urls = {"get": path, "cancel": f"{path}/cancel", "web": path}
            assert hook.bodies[-1] == polled | {"urls": urls}
            assert hook.posts[0][0][0] == "POST /hook?x=1 HTTP/1.1"
            headers = [hook.headers(index) for index in range(3)]
            assert len({each["webhook-id"] for each in headers}) == 3
            for each, (_, content) in zip(headers, hook.posts, strict=True):
                assert abs(int(each["webhook-timestamp"]) - time.time()) < 5
                assert each["content-type"] == "application/json"
                assert each["host"] == f"127.0.0.1:{hook.port}"
                again = one.webhooks.secret.headers(
                    each["webhook-id"], int(each["webhook-timestamp"]), content
                )
                assert again.items() <= each.items()
            assert one.webhooks.counts == {
                (event, "delivered"): 1 for event in ("start", "output", "completed")
            }
            assert one.journal.untold() == []

    run(test)


def test_only_events_that_were_asked_for_are_sent(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            receiver() as hook,
            webhooks(tmp_path / "j", hook.origin) as w,
        ):
            for id, events in (("a", ("completed",)), ("b", ("start", "logs")), ("c", ())):
                one = told(hook.url, id, events)  # type: ignore[arg-type]
                await w._journal.accepted(one)
                for event in EVENTS:
                    w.tell(one, event)
            w.tell(replace(told(hook.url, "d"), webhook=None), "completed")
            await w.drain(1)
            assert sorted(each["id"] for each in hook.bodies) == ["a", "b", "b"]
            assert w._journal.untold() == []
            assert w._lines == {}

    run(test)


def test_a_message_says_how_things_stood_at_its_event(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            receiver() as hook,
            webhooks(tmp_path / "j", hook.origin) as w,
        ):
            one = told(hook.url, status="processing", outcome=None)
            w.tell(one, "start")
            one.status = "failed"
            w.tell(one, "completed")
            await w.drain(1)
            assert [each["status"] for each in hook.bodies] == ["processing", "failed"]

    run(test)


def test_news_come_at_most_each_half_second(tmp_path: Path) -> None:
    async def test() -> None:
        clock, poster = Clock(), Taking()
        async with webhooks(tmp_path / "j", "hooks.test", poster=poster) as w:
            one = told("https://hooks.test/", is_journaled=False)
            for pause_s, event in (
                (0.0, "start"),
                (0.0, "logs"),
                (0.4, "logs"),
                (0.05, "output"),
                (0.1, "logs"),
                (0.4, "output"),
                (0.0, "completed"),
            ):
                await clock.advance(pause_s)
                w.tell(one, event)  # type: ignore[arg-type]
            await settled()
            delivered = {event: num for (event, _), num in w.counts.items()}
            assert delivered == {"start": 1, "logs": 2, "completed": 1}
            assert len(set(poster.ids)) == len(poster.ids) == 4

    run(test)


def test_the_order_of_a_prediction_is_kept_while_one_is_slow(tmp_path: Path) -> None:
    async def test() -> None:
        is_open = asyncio.Event()

        async def slow(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if len(hook.posts) == 1:
                await is_open.wait()
            writer.write(b"HTTP/1.1 204 X\r\n\r\n")

        async with (
            receiver() as hook,
            webhooks(tmp_path / "j", hook.origin) as w,
        ):
            hook.answering = slow
            one = told(hook.url, status="processing")
            w.tell(one, "start")
            await hook.has(1)
            one.status = "succeeded"
            w.tell(one, "completed")
            other = told(hook.url, "b")
            w.tell(other, "completed")
            await hook.has(2)  # another prediction's is not held up
            assert hook.bodies[1]["id"] == "b"
            is_open.set()
            await w.drain(1)
            assert [each["status"] for each in hook.bodies if each["id"] == "a"] == [
                "processing",
                "succeeded",
            ]

    run(test)


def test_the_end_is_sent_until_it_is_taken_with_the_same_id(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            receiver() as hook,
            webhooks(tmp_path / "j", hook.origin) as w,
        ):
            hook.statuses = [500, 302, 429, 400, 201]
            one = told(hook.url)
            await w._journal.accepted(one)
            w.tell(one, "completed")
            await w.drain(2)
            assert len(hook.posts) == 5
            assert len({hook.headers(index)["webhook-id"] for index in range(5)}) == 1
            assert w.counts == {("completed", "delivered"): 1}
            assert w._journal.untold() == []

    run(test)


def test_other_events_are_sent_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            receiver() as hook,
            webhooks(tmp_path / "j", hook.origin) as w,
        ):
            hook.statuses = [500]
            w.tell(told(hook.url), "start")
            w.tell(told(hook.url), "logs")
            await w.drain(1)
            assert w.counts == {("start", "failed"): 1, ("logs", "failed"): 1}
            assert len(hook.posts) == 2

    run(test)


def test_the_end_is_given_up_after_its_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with (
            receiver() as hook,
            webhooks(tmp_path / "j", hook.origin) as w,
        ):
            hook.statuses = [503]
            one = told(hook.url)
            await w._journal.accepted(one)
            w.tell(one, "completed")
            await w.drain(2)
            assert len(hook.posts) == 1 + len(list(FAST.pauses_s()))
            assert w.counts == {("completed", "failed"): 1}
            assert w._journal.untold() == []
            assert "it answered 503" in caplog.text
            assert "x=1" not in caplog.text

    run(test)


def test_the_pauses_double_up_to_a_minute_and_take_five_minutes() -> None:
    pauses = list(Pace().pauses_s())
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert 240 < sum(pauses) <= 300


def test_an_end_that_was_not_told_is_sent_after_a_restart_with_the_same_id(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiver() as hook:
            host, url = hook.origin, f"http://127.0.0.1:{hook.port}/a"
            hook.statuses = [503]
            async with world(tmp_path / "j", webhook_hosts=(host,)) as one:
                body = {"input": {"prompt": "x"}, "webhook": url}
                body["webhook_events_filter"] = ["completed"]
                await one.post("/v1/models/a/b/predictions", body, Prefer="wait")
                await hook.has(1)
            hook.statuses = [200]
            async with world(tmp_path / "j", webhook_hosts=("other.test",)) as one:
                one.webhooks.resume()  # the list is another one now
                await one.webhooks.drain(1)
                assert len(hook.posts) == 1
            async with world(tmp_path / "j", webhook_hosts=(host,)) as one:
                one.webhooks.resume()
                await one.webhooks.drain(1)
                assert hook.bodies[0] == hook.bodies[1]
                assert hook.bodies[1]["output"][0].startswith("data:image/png")
                assert hook.headers(0)["webhook-id"] == hook.headers(1)["webhook-id"]
                one.webhooks.resume()
                assert one.webhooks._lines == {}

    run(test)
