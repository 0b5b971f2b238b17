"""Replicate's dialect over a gateway with fake engines, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from gateway.fake_engines import FakeEngines
from gateway.gateways import run
from gateway.webhook_world import NO_ROOTS
from starlette.applications import Starlette

from deploy.gateway.dialects.contract import Contract
from deploy.gateway.dialects.replicate_dialect import ReplicateDialect
from deploy.gateway.dialects.replicate_routes import routes
from deploy.gateway.hooks.webhook_messages import Pace
from deploy.gateway.hooks.webhook_post import Poster
from deploy.gateway.hooks.webhooks import Webhooks
from deploy.gateway.keeping.journal import Journal
from deploy.gateway.life.predictions import Predictions
from deploy.gateway.settings import GatewaySettings

GATE, PUBLIC = "http://gate:5000", "https://pictures.test/below"


@cache
def contract() -> Contract:
    """Reading predict.py takes longer than most tests."""
    return Contract()


@dataclass
class World:
    """A gateway, and what it is made of."""

    client: httpx.AsyncClient
    app: Starlette
    engines: FakeEngines
    journal: Journal
    predictions: Predictions
    webhooks: Webhooks

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return await self.client.post(path, json=body, headers=named)

    async def create(self, wait: str = "wait", **inputs: Any) -> dict[str, Any]:
        """A prediction of these inputs, as the answer to its creation has it."""
        body = {"input": {"prompt": "a cat", "seed": 7, **inputs}}
        response = await self.post("/v1/models/me/dmd2/predictions", body, Prefer=wait)
        assert response.status_code == 201, response.text
        said: dict[str, Any] = response.json()
        return said

    async def get(self, path: str) -> Any:
        response = await self.client.get(path)
        assert response.status_code == 200, response.text
        return response.json()


@asynccontextmanager
async def world(
    folder: Path,
    engines: FakeEngines | None = None,
    poster: Poster | None = None,
    pace: Pace | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """One, with its journal in a folder, until the end."""
    held, engines = GatewaySettings(**settings), engines or FakeEngines()
    journal = Journal(folder)
    try:
        dialect = ReplicateDialect(engines, held, journal, contract())
        poster = poster or Poster(tls=NO_ROOTS)
        webhooks = Webhooks(held, journal, {"replicate": dialect.body}, poster, pace)
        predictions = Predictions(engines, held, journal, webhooks.tell)
        app = Starlette(routes=routes(dialect, predictions, webhooks, journal, held))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=GATE, trust_env=False) as client:
            yield World(client, app, engines, journal, predictions, webhooks)
        await webhooks.drain(0)
    finally:
        journal.close()


FIELDS = {
    "id", "model", "version", "input", "output", "logs", "error", "status", "metrics",
    "created_at", "started_at", "completed_at", "data_removed", "source", "urls",
}  # fmt: skip


def within(
    folder: Path, test: Callable[[World], Coroutine[Any, Any, None]], **settings: Any
) -> None:
    """Run a test in a world of its own."""

    async def whole() -> None:
        async with world(folder, **settings) as one:
            await test(one)

    run(whole)


def held() -> FakeEngines:
    """Engines whose work a test ends."""
    return FakeEngines(is_held=True)
