"""What a gateway shows beside predictions: its health, its schema, its numbers; and to whom."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.gateway.dialects.cog_dialect import Refusal
from deploy.gateway.dialects.contract import Contract
from deploy.gateway.front.gateway_metrics import GatewayMetrics
from deploy.gateway.life.readiness import Readiness

# They say whether the gateway is well and nothing else, and probes bear no token.
_OPEN = ("/health-check", "/ready")
_UNAUTHENTICATED = {
    "title": "Unauthenticated",
    "detail": "Send the gateway's DMD2_API_TOKEN as Authorization: Bearer TOKEN.",
    "status": 401,
}


def views(
    cog: Sequence[BaseRoute],
    contract: Contract,
    readiness: Readiness,
    metrics: GatewayMetrics,
    api_token: str,
) -> Mount:
    """All but Replicate's dialect, for those who may ask.

    Args:
        cog: the routes of Cog's predictions.
        contract: has the schema that is shown.
        readiness: is shown too.
        metrics: likewise.
        api_token: that is asked for; "" for none.
    """
    table = [*cog, *_Views(contract, readiness, metrics).routes()]
    handlers: Any = {Refusal: _refused, HTTPException: _empty, Exception: _broken}
    app = Starlette(routes=table, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Mount("/", app=_Guarded(app, api_token))


class _Views:
    """What shows the gateway as it is."""

    def __init__(self, contract: Contract, readiness: Readiness, metrics: GatewayMetrics) -> None:
        self._readiness, self._metrics = readiness, metrics
        self._schema = json.dumps(contract.schema, sort_keys=True).encode()
        self._index = json.dumps(
            {
                "cog_version": contract.cog_version,
                "docs_url": "/docs",
                "healthcheck_url": "/health-check",
                "openapi_url": "/openapi.json",
                "predictions_cancel_url": "/predictions/{prediction_id}/cancel",
                "predictions_idempotent_url": "/predictions/{prediction_id}",
                "predictions_url": "/predictions",
            }
        ).encode()

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("/", self._root),
            Route("/openapi.json", self._openapi),
            Route("/health-check", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._scrape),
        ]

    async def _root(self, _: Request) -> Response:
        return _json(self._index)

    async def _openapi(self, _: Request) -> Response:
        return _json(self._schema)

    async def _health(self, _: Request) -> Response:
        return _json(json.dumps(self._readiness.health()).encode())

    async def _ready(self, _: Request) -> Response:
        """For probes: 200 while requests are taken, which a full queue does soon again."""
        status = 200 if self._readiness.takes_requests else 503
        return _json(json.dumps({"status": self._readiness.status}).encode(), status)

    async def _scrape(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)


class _Guarded:
    """An app for those who bear the token, but for what is open to all."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._may_ask(Request(scope)):
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer"}
        content = json.dumps(_UNAUTHENTICATED).encode()
        response = Response(content, 401, headers, media_type="application/problem+json")
        await response(scope, receive, send)

    def _may_ask(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), self._token)
        is_bearer = scheme.lower() == "bearer" and is_right
        return not self._token or request.scope["path"] in _OPEN or is_bearer


def _json(content: bytes, status: int = 200) -> Response:
    return Response(content, status, media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = {"Content-Type": error.media_type}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return Response(error.content, error.status, headers)


async def _empty(_: Request, error: Exception) -> Response:
    """Where there is no such route or method, as Cog's server says it: not at all."""
    assert isinstance(error, HTTPException)
    return Response(status_code=error.status_code, headers=error.headers)


async def _broken(_: Request, error: Exception) -> Response:
    """Starlette passes the error on to the log."""
    said = {"error": "the gateway failed; its log says why", "status": "failed"}
    return _json(json.dumps(said).encode(), 500)
