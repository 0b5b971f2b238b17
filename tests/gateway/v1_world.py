"""Replicate's dialect over a gateway with fake engines, and a client of it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cog_schema import build_schema
from gateway.fake_engines import FakeEngines
from starlette.applications import Starlette

from deploy.gateway.journal import Journal
from deploy.gateway.predictions import Predictions
from deploy.gateway.replicate_dialect import ReplicateDialect
from deploy.gateway.replicate_routes import routes
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.webhook_messages import Pace
from deploy.gateway.webhook_post import Poster
from deploy.gateway.webhooks import Webhooks
from deploy.gateway.work import Work
from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraInputs
from dmd2.settings import ROOT

PUBLIC = "https://pictures.test/below"


class Contract:
    """Inputs by the rules of the request alone."""

    schema = build_schema((ROOT / "predict.py").read_text())

    def new_id(self) -> str:
        return secrets.token_hex(12)

    def work(
        self, id: str, inputs: Mapping[str, Any], card: ModelCard
    ) -> tuple[Work, dict[str, Any]]:
        rest = dict(inputs)
        loras = LoraInputs.taken_from(rest)
        return Work(id, GenerationRequest.resolve(card, **rest), loras), dict(inputs)


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
        dialect = ReplicateDialect(engines, held, journal, Contract())
        webhooks = Webhooks(held, journal, {"replicate": dialect.body}, poster, pace)
        predictions = Predictions(engines, held, journal, webhooks.tell)
        app = Starlette(routes=routes(dialect, predictions, webhooks, journal, held))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gate:5000") as client:
            yield World(client, app, engines, journal, predictions, webhooks)
        await webhooks.drain(0)
    finally:
        journal.close()
