"""A gateway as an ASGI app: all of its parts, put together, begun and ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.routing import BaseRoute

from deploy.gateway.dialects import replicate_routes
from deploy.gateway.dialects.cog_routes import CogRoutes
from deploy.gateway.dialects.contract import Contract
from deploy.gateway.dialects.replicate_dialect import ReplicateDialect
from deploy.gateway.front.gateway_metrics import GatewayMetrics, Readings
from deploy.gateway.front.views import views
from deploy.gateway.hooks.webhooks import Body, Webhooks
from deploy.gateway.keeping.journal import Journal
from deploy.gateway.life.predictions import Predictions
from deploy.gateway.life.readiness import Readiness
from deploy.gateway.prediction import Dialect, Event, Prediction
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.work import Engines

# What waits for a webhook's receiver at the end is told by the next gateway, if it is journaled.
_WEBHOOKS_END_S = 10.0


def make_app(engines: Engines, settings: GatewaySettings) -> Starlette:
    """The gateway before some engines, which its lifespan begins and ends.

    While it runs, `state.predictions` is what it does, and `state.following` a task that ends only
    where no engine can be opened, with the ModelError that says why.

    Raises:
        DMD2Error: (by the lifespan) another gateway has the journal, or a setting is wrong.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        gateway = _Gateway(engines, settings)
        app.router.routes[:] = gateway.routes
        app.state.predictions = gateway.predictions
        async with gateway.running() as app.state.following:
            yield

    app = Starlette(lifespan=lifespan)
    app.router.redirect_slashes = False
    return app


class _Gateway:
    """A gateway's parts.

    Attributes:
        predictions: that it has.
        routes: all of them.
    """

    def __init__(self, engines: Engines, settings: GatewaySettings) -> None:
        self._engines = engines
        self._journal = journal = Journal(
            settings.journal_dir, settings.keep_outputs_s, settings.max_output_bytes
        )
        contract = Contract(settings.cell)
        replicate = ReplicateDialect(engines, settings, journal, contract)
        bodies: dict[Dialect, Body] = {"cog": self._cog_body, "replicate": replicate.body}
        self._webhooks = webhooks = Webhooks(settings, journal, bodies)
        self.predictions = Predictions(engines, settings, journal, self._tell)
        self._readiness = Readiness(engines, self.predictions)
        self._cog = CogRoutes(
            contract, self._readiness, self.predictions, journal.outputs, webhooks.hosts
        )
        readings = Readings(self.predictions, engines, settings.max_queued, webhooks.counts)
        metrics = GatewayMetrics(readings)
        token = settings.api_token
        self.routes: list[BaseRoute] = [
            *replicate_routes.routes(replicate, self.predictions, webhooks, journal, settings),
            views(self._cog.routes(), contract, self._readiness, metrics, token),
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        """Take up what an earlier gateway has left, and end it all; gives the readiness's task."""
        await self.predictions.resume()
        self._webhooks.resume()
        following = asyncio.create_task(self._readiness.follow())
        try:
            yield following
        finally:
            await self.predictions.stop()
            following.cancel()
            with suppress(asyncio.CancelledError, Exception):  # whoever cares has looked
                await following
            await self._webhooks.drain(_WEBHOOKS_END_S)
            await self._engines.close()
            self._journal.close()

    def _tell(self, prediction: Prediction, event: Event) -> None:
        self._webhooks.tell(prediction, event)

    async def _cog_body(self, prediction: Prediction) -> bytes:
        return await self._cog.body(prediction)
