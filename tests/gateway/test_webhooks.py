"""Webhooks: signed, in order, to allowed hosts at allowed addresses, whatever a receiver does."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import ssl
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from gateway.fake_engines import FakeEngines, prediction, settled
from gateway.gateways import Clock, run
from gateway.v1_world import World, world

from deploy.gateway.journal import Journal
from deploy.gateway.prediction import EVENTS, Event, Prediction, Webhook
from deploy.gateway.replicate_bodies import DEFAULT_EVENTS
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.webhook_hosts import WebhookHosts
from deploy.gateway.webhook_messages import Pace
from deploy.gateway.webhook_post import Poster, PostError, PostLimits
from deploy.gateway.webhook_secret import FILE, WebhookSecret, webhook_secret
from deploy.gateway.webhooks import Webhooks
from deploy.gateway.work import Outcome
from dmd2.errors import DMD2Error, InvalidRequestError

FAST = Pace(first_retry_s=0.01, last_retry_s=0.02, retry_for_s=0.2)
# For what is to take too long, and for a busy machine, where nothing is.
SHORT, LONG = PostLimits(connect_s=0.3, total_s=0.3), PostLimits(connect_s=10, total_s=10)
Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Receiver:
    """Listens on loopback.

    Attributes:
        port: where.
        posts: head and body of each request, as it came.
        statuses: of the answers, the last one for all that follow.
        answering: what it does instead, once it has a request.
    """

    port: int = 0
    posts: list[tuple[list[str], bytes]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=lambda: [200])
    answering: Answering | None = None
    num_open: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?x=1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.posts]

    def headers(self, index: int) -> dict[str, str]:
        pairs = [line.split(": ", 1) for line in self.posts[index][0][1:] if line]
        return {name.lower(): text for name, text in pairs}

    async def has(self, num: int) -> None:
        while len(self.posts) < num:
            await asyncio.sleep(0.002)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        with suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            length = next(int(x[16:]) for x in head if x.startswith("Content-Length: "))
            self.posts.append((head, await reader.readexactly(length)))
            if self.answering is not None:
                await self.answering(reader, writer)
            else:
                status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)
                await writer.drain()
        writer.close()
        self.num_open -= 1


@asynccontextmanager
async def receiver(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    one = Receiver()
    server = await asyncio.start_server(one._serve, "127.0.0.1", 0, ssl=tls)
    one.port = server.sockets[0].getsockname()[1]
    try:
        yield one
        while one.num_open:  # until it has noticed that its client has gone
            await asyncio.sleep(0.002)
    finally:
        server.close()


def told(url: str, id: str = "a", events: tuple[Event, ...] = EVENTS, **more: Any) -> Prediction:
    """A prediction that has come to its end, with a webhook."""
    one = replace(prediction(id, is_journaled=True), webhook=Webhook(url, events))
    one.status, one.outcome = "succeeded", Outcome(logs="x\n")
    return replace(one, **more)


async def said(one: Prediction) -> bytes:
    return json.dumps({"id": one.id, "status": one.status}).encode()


class Taking(Poster):
    """Takes everything at once, and keeps the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []

    async def post(self, receiver: object, headers: Mapping[str, str], body: bytes) -> None:
        self.ids.append(headers["webhook-id"])


@asynccontextmanager
async def webhooks(
    folder: Path,
    *hosts: str,
    pace: Pace = FAST,
    poster: Poster | None = None,
    **settings: Any,
) -> AsyncIterator[Webhooks]:
    """Webhooks to these hosts, with a journal in a folder."""
    journal = Journal(folder)
    held = GatewaySettings(webhook_hosts=hosts, **settings)
    poster = poster or Poster(limits=LONG)
    one = Webhooks(held, journal, {"replicate": said, "cog": said}, poster, pace)
    try:
        yield one
        await one.drain(0)
    finally:
        journal.close()


# Whom may be told.


@pytest.mark.parametrize(
    ("listed", "url"),
    [
        ("hooks.test", "https://hooks.test/a?b=c%20d"),
        ("hooks.test", "https://HOOKS.test:443"),
        ("https://hooks.test", "https://hooks.test/"),
        ("hooks.test:8443", "https://hooks.test:8443/x"),
        ("http://hooks.test", "http://hooks.test/"),
        ("http://localhost:9000", "http://localhost:9000/x"),
        ("http://[::1]:9000", "http://[::1]:9000/x"),
        ("10.1.2.3", "https://10.1.2.3/x"),
    ],
)
def test_a_listed_host_may_be_told(listed: str, url: str) -> None:
    one = WebhookHosts([listed, "other.test"]).receiver(url)
    assert one.target == (url[url.index("/", 8) :] if url.count("/") > 2 else "/")
    assert one.authority.lower() in url.lower()


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.test/",
        "https://hooks.test:8443/",
        "https://other.test/",
        "https://sub.hooks.test/",
        "https://hooks.test.evil.test/",
        "https://evil.test/hooks.test",
        "https://evil.test#hooks.test",
        "https://hooks.test@evil.test/",
        "https://u:p@hooks.test/",
        "https://u@hooks.test/",
        "https://@hooks.test/",
        "https://hooks.test./",
        "https://hooks.test\\@evil.test/",
        "https://hooks.test/\r\nX: y",
        "https://hooks.test/a b",
        "https://hooks.test/ä",
        "https://hooks.test:99999/",
        "https://hooks.test:0/",
        "https://hooks.test:x/",
        "https://[hooks.test/",
        "ftp://hooks.test/",
        "file:///etc/passwd",
        "//hooks.test/",
        "hooks.test",
        "https://127.0.0.1/",
        "https://169.254.169.254/latest",
        "https://localhost/",
        "https://hooks.test/" + "a" * 2000,
        "",
        7,
        ["https://hooks.test/"],
    ],
)
def test_nobody_else_may_be_told(url: object) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        WebhookHosts(["hooks.test"]).asked({"webhook": url}, DEFAULT_EVENTS)
    assert refused.value.field == "webhook"
    assert "latest" not in str(refused.value)


def test_without_a_list_nobody_is_told() -> None:
    with pytest.raises(InvalidRequestError, match="DMD2_WEBHOOK_HOSTS"):
        WebhookHosts([]).receiver("https://hooks.test/")


@pytest.mark.parametrize(
    "entry", ["*", "*.hooks.test", "ftp://a.test", "a.test/x", "a.test:0", "u@a.test", "a b", "a?b"]
)
def test_a_list_that_is_wrong_is_refused_at_the_start(entry: str) -> None:
    with pytest.raises(DMD2Error, match="DMD2_WEBHOOK_HOSTS"):
        WebhookHosts([entry])


def test_events_are_those_asked_for_or_the_dialects_own() -> None:
    hosts, url = WebhookHosts(["hooks.test"]), "https://hooks.test/"
    asked = {"webhook": url}
    assert hosts.asked({}, DEFAULT_EVENTS) is None
    assert hosts.asked(asked, DEFAULT_EVENTS) == Webhook(url, ("output", "completed"))
    filtered = asked | {"webhook_events_filter": ["completed", "start"]}
    assert hosts.asked(filtered, DEFAULT_EVENTS) == Webhook(url, ("start", "completed"))
    for wrong in (["done"], "start", [["start"]], {"start": 1}, [None]):
        with pytest.raises(InvalidRequestError) as refused:
            hosts.asked(asked | {"webhook_events_filter": wrong}, DEFAULT_EVENTS)
        assert refused.value.field == "webhook_events_filter"


# The secret.


def test_a_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    one = webhook_secret("", tmp_path)
    assert webhook_secret("", tmp_path) == one
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    prefix, _, key = one.text.partition("_")
    assert (prefix, len(base64.b64decode(key, validate=True))) == ("whsec", 32)
    assert one.text not in repr(one)
    given = "whsec_" + base64.b64encode(bytes(24)).decode()
    assert webhook_secret(given, tmp_path).text == given
    assert webhook_secret("", tmp_path) == one


@pytest.mark.parametrize(
    "text",
    ["", "whsec_", "whsec_AAAA", "x" * 40, "whsec_" + "!" * 40, "whsec_" + "A" * 200, "whsec_ä"],
)
def test_what_is_no_secret_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(DMD2Error, match="openssl rand") as refused:
        WebhookSecret(text)
    assert not text or text == "whsec_" or text not in str(refused.value)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DMD2Error, match=FILE):
        webhook_secret("", tmp_path)


def test_a_signature_is_the_hmac_of_id_timestamp_and_body() -> None:
    key = bytes(range(24))
    one = WebhookSecret("whsec_" + base64.b64encode(key).decode())
    headers = one.headers("msg_1", 1_700_000_000, b'{"a": 1}')
    digest = hmac.new(key, b'msg_1.1700000000.{"a": 1}', hashlib.sha256).digest()
    assert headers == {
        "webhook-id": "msg_1",
        "webhook-timestamp": "1700000000",
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


# What is sent, and in what order.


def test_each_event_is_a_signed_post_of_the_dialects_own_body(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            receiver() as hook,
            world(
                tmp_path / "j", FakeEngines(), webhook_hosts=(f"http://127.0.0.1:{hook.port}",)
            ) as one,
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
            webhooks(tmp_path / "j", f"http://127.0.0.1:{hook.port}") as w,
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
            webhooks(tmp_path / "j", f"http://127.0.0.1:{hook.port}") as w,
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
            webhooks(tmp_path / "j", f"http://127.0.0.1:{hook.port}") as w,
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


# What goes wrong.


def test_the_end_is_sent_until_it_is_taken_with_the_same_id(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            receiver() as hook,
            webhooks(tmp_path / "j", f"http://127.0.0.1:{hook.port}") as w,
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
            webhooks(tmp_path / "j", f"http://127.0.0.1:{hook.port}") as w,
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
            webhooks(tmp_path / "j", f"http://127.0.0.1:{hook.port}") as w,
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
            host, url = f"http://127.0.0.1:{hook.port}", f"http://127.0.0.1:{hook.port}/a"
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


def test_who_may_not_be_told_is_refused_before_anything_is_accepted(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        for url in ("http://127.0.0.1:1/", "https://169.254.169.254/", "https://hooks.test:444/"):
            body = {"input": {"prompt": "x"}, "webhook": url}
            response = await one.post("/v1/models/a/b/predictions", body)
            assert response.status_code == 422
            assert response.json()["invalid_fields"][0]["field"] == "webhook"
        assert one.engines.asked == []

    async def whole() -> None:
        async with world(tmp_path / "j", webhook_hosts=("hooks.test",)) as one:
            await test(one)

    run(whole)


# Bounds.


def test_a_receiver_that_is_slow_holds_up_nobody_else(tmp_path: Path) -> None:
    async def test() -> None:
        async def forever(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            await reader.read()

        pace = replace(FAST, at_once=2, max_waiting=4)
        async with receiver() as slow, receiver() as quick:
            hosts = [f"http://127.0.0.1:{each.port}" for each in (slow, quick)]
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
            async with webhooks(tmp_path / "j", f"http://127.0.0.1:{hook.port}", pace=pace) as w:
                url = hook.url.partition("?")[0]
                for number in range(7):
                    one = told(url, f"p{number}", ("start", "completed"))
                    await w._journal.accepted(one)
                    await w._journal.finished(replace(one, completed_at=one.created_at))
                    for event in ("start", "completed"):
                        w.tell(one, event)  # type: ignore[arg-type]
                while w._journal.untold():
                    await asyncio.sleep(0.005)
                await settled()
                assert w.counts["completed", "delivered"] == 7
                assert w._lines == {}
                assert w.counts["start", "dropped"] > 0

    run(test)


def test_outputs_in_memory_are_bounded(tmp_path: Path) -> None:
    async def test() -> None:
        pace = replace(FAST, max_bytes=1000)
        async with receiver() as hook:
            async with webhooks(tmp_path / "j", f"http://127.0.0.1:{hook.port}", pace=pace) as w:
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
            webhooks(tmp_path / "j", f"http://127.0.0.1:{hook.port}") as w,
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


# One POST, and receivers that mean harm.


def post(poster: Poster, listed: str, url: str, body: bytes = b"{}") -> Awaitable[None]:
    return poster.post(WebhookHosts([listed]).receiver(url), {}, body)


@pytest.mark.parametrize(
    "found",
    [
        ["127.0.0.1"],
        ["169.254.169.254"],
        ["10.0.0.1"],
        ["8.8.8.8", "192.168.1.1"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        [],
    ],
)
def test_a_name_that_leads_inside_is_not_connected_to(found: list[str]) -> None:
    async def test() -> None:
        async with receiver() as hook:
            poster = Poster(lambda _, port: [(ip, port) for ip in found], limits=LONG)
            url = f"http://hooks.test:{hook.port}"
            with pytest.raises(PostError, match="not at public addresses"):
                await post(poster, url, url)
            assert hook.posts == []
            poster.close()

    run(test)


def test_a_name_is_resolved_once_and_connected_to_as_resolved() -> None:
    async def test() -> None:
        async with receiver() as hook:
            answers = [["127.0.0.1"], ["10.0.0.1"]]  # a name that leads elsewhere the next time
            poster = Poster(
                lambda _, port: [(ip, port) for ip in answers.pop(0)],
                is_public=lambda ip: ip == "127.0.0.1",
                limits=LONG,
            )
            url = f"http://hooks.test:{hook.port}"
            await post(poster, url, url)
            assert hook.headers(0)["host"] == f"hooks.test:{hook.port}"
            assert answers == [["10.0.0.1"]]
            with pytest.raises(PostError, match="not at public addresses"):
                await post(poster, url, url)
            poster.close()

    run(test)


def test_a_listed_address_or_localhost_may_be_inside() -> None:
    async def test() -> None:
        async with receiver() as hook:
            poster = Poster(limits=LONG)
            for host in ("127.0.0.1", "localhost"):
                url = f"http://{host}:{hook.port}"
                await post(poster, url, url)
            assert len(hook.posts) == 2
            poster.close()

    run(test)


def test_an_address_that_is_dead_is_passed_over() -> None:
    async def test() -> None:
        async with receiver() as hook:
            poster = Poster(
                lambda _, port: [("127.0.0.9", port), ("127.0.0.1", port)],
                is_public=lambda _: True,
                limits=LONG,
            )
            url = f"http://hooks.test:{hook.port}"
            await post(poster, url, url)
            assert len(hook.posts) == 1
            poster.close()

    run(test)


def test_a_name_that_takes_long_to_look_up_is_given_up() -> None:
    async def test() -> None:
        def slow(_: str, port: int) -> list[tuple[str, int]]:
            time.sleep(1)
            return [("127.0.0.1", port)]

        poster = Poster(slow, limits=SHORT)
        began = time.monotonic()
        with pytest.raises(PostError, match="longer than 0.3 s"):
            await post(poster, "hooks.test", "https://hooks.test/")
        assert time.monotonic() - began < 0.8
        poster.close()

    run(test)


async def sends_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: " + b"y" * 10_000)
        await writer.drain()


async def announces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early\r\n\r\n")
        await writer.drain()


async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200")


async def babbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")


async def redirects(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:1/\r\n\r\n")


@pytest.mark.parametrize(
    ("answering", "why"),
    [
        (sends_nothing, "longer than 0.3 s"),
        (drips, "longer than 0.3 s"),
        (floods, "longer than 16384 bytes"),
        (announces, "never began"),
        (closes, "broke off"),
        (babbles, "not answer as HTTP"),
        (redirects, "answered 307"),
    ],
)
def test_a_receiver_that_means_harm_costs_little(answering: Answering, why: str) -> None:
    async def test() -> None:
        async with receiver() as hook:
            hook.answering = answering
            poster = Poster(limits=SHORT if "longer than 0.3" in why else LONG)
            url = f"http://127.0.0.1:{hook.port}"
            with pytest.raises(PostError, match=why):
                await post(poster, url, url)
            poster.close()

    run(test)


def test_a_receiver_that_does_not_read_is_given_up() -> None:
    async def test() -> None:
        async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while not is_over:
                await asyncio.sleep(0.01)
            writer.close()

        is_over: list[bool] = []
        server = await asyncio.start_server(deaf, "127.0.0.1", 0, limit=1)
        poster = Poster(limits=SHORT)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(PostError, match="longer than"):
            await post(poster, url, url, bytes(50_000_000))
        is_over.append(True)
        await asyncio.sleep(0.05)
        server.close()
        poster.close()

    run(test)


def test_an_answer_that_goes_on_is_not_read(tmp_path: Path) -> None:
    async def test() -> None:
        async def long(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
            while True:
                writer.write(bytes(1_000_000))
                await writer.drain()

        async with receiver() as hook:
            hook.answering = long
            poster = Poster(limits=LONG)
            url = f"http://127.0.0.1:{hook.port}"
            await post(poster, url, url)
            poster.close()

    run(test)
