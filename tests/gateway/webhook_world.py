"""Receivers of webhooks on loopback, and what tells them."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gateway.fake_engines import prediction

from deploy.gateway.hooks.webhook_messages import Pace
from deploy.gateway.hooks.webhook_post import Poster, PostLimits
from deploy.gateway.hooks.webhooks import Webhooks
from deploy.gateway.keeping.journal import Journal
from deploy.gateway.prediction import EVENTS, Event, Prediction, Webhook
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.work import Outcome

FAST = Pace(first_retry_s=0.01, last_retry_s=0.02, retry_for_s=0.2)


NO_ROOTS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
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
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.origin}/hook?x=1"

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
    """Takes everything, at once or when a test says so.

    Attributes:
        ids: of the messages.
        bodies: of them.
        gates: by a prediction's id, what its messages wait for.
    """

    def __init__(self) -> None:
        super().__init__(tls=NO_ROOTS)
        self.ids: list[str] = []
        self.bodies: list[dict[str, str]] = []
        self.gates: dict[str, asyncio.Event] = {}

    def hold(self, *ids: str) -> None:
        for id in ids:
            self.gates[id] = asyncio.Event()

    async def post(self, receiver: object, headers: Mapping[str, str], body: bytes) -> None:
        said = json.loads(body)
        if (gate := self.gates.get(said["id"])) is not None:
            await gate.wait()
        self.ids.append(headers["webhook-id"])
        self.bodies.append(said)


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
    poster = poster or Poster(tls=NO_ROOTS, limits=LONG)
    one = Webhooks(held, journal, {"replicate": said, "cog": said}, poster, pace)
    try:
        yield one
        await one.drain(0)
    finally:
        journal.close()
