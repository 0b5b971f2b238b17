"""Gateways that answer on a port of this machine, on the test's own event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from gateway.fake_engines import FakeEngines
from starlette.applications import Starlette

from deploy.gateway.front.app import make_app
from deploy.gateway.front.serving import listening, serve
from deploy.gateway.life.predictions import Predictions
from deploy.gateway.settings import GatewaySettings

ASK = {"prompt": "a cat", "seed": 7}
ASYNC = {"Prefer": "respond-async"}


@dataclass
class Front:
    """A gateway, who asks it, and what is behind it."""

    http: httpx.AsyncClient
    engines: Any
    app: Starlette
    stop: asyncio.Event
    serving: asyncio.Task[None]

    @property
    def predictions(self) -> Predictions:
        """What it does."""
        found: Predictions = self.app.state.predictions
        return found

    async def post(self, inputs: Any = ASK, **more: Any) -> httpx.Response:
        """The answer to a request by POST; headers apart, more goes into the body."""
        headers = more.pop("headers", {})
        return await self.http.post("/predictions", json={"input": inputs, **more}, headers=headers)

    async def put(self, id: str, inputs: Any = ASK, **headers: str) -> httpx.Response:
        """The answer to a request by PUT."""
        body = {"input": inputs}
        return await self.http.put(f"/predictions/{id}", json=body, headers=headers)

    async def has_asked(self, *ids: str) -> None:
        """Wait until the engines were given work of these ids."""
        await until(lambda: set(ids) <= set(self.engines.asked))

    async def health(self) -> dict[str, Any]:
        """What it says of itself."""
        return dict((await self.http.get("/health-check")).json())


@asynccontextmanager
async def front(
    folder: Path, engines: Any = None, is_ready: bool = True, **settings: Any
) -> AsyncIterator[Front]:
    """A gateway before fake engines, which answer at once unless others are given.

    At the end it drains; what engines still hold they answer then.
    """
    engines = FakeEngines() if engines is None else engines
    gateway = GatewaySettings(journal_dir=folder / "journal", **settings)
    listener = listening("127.0.0.1", 0, gateway)
    port, stop, app = listener.getsockname()[1], asyncio.Event(), make_app(engines, gateway)
    serving = asyncio.create_task(serve(app, listener, stop))
    token = {"Authorization": f"Bearer {gateway.api_token}"} if gateway.api_token else {}
    url, limit = f"http://127.0.0.1:{port}", httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, trust_env=False, timeout=20, headers=token, limits=limit
    ) as http:
        while is_ready and (await http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.005)
        yield Front(http, engines, app, stop, serving)
        if isinstance(engines, FakeEngines):
            engines.is_held = False
            for id in list(engines.under_way):
                engines.finish(id)
    stop.set()
    await serving


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.005)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's body."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


@asynccontextmanager
async def receiver() -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """A webhook's, with all that it was told."""
    told: list[dict[str, Any]] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
            told.append(json.loads(await reader.readexactly(length)))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", told
