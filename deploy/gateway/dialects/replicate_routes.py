"""Replicate's dialect over HTTP: all that is below /v1, and the outputs' files.

Files are handed to whoever knows their names, of 128 random bits, as Replicate's own delivery does:
the JavaScript client sends no token for them. They are there with DMD2_PUBLIC_URL alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.gateway.dialects.replicate_bodies import ACCOUNT
from deploy.gateway.dialects.replicate_dialect import OUTPUTS_PATH, ReplicateDialect
from deploy.gateway.dialects.replicate_problems import Problem, invalid_request, not_found
from deploy.gateway.dialects.replicate_requests import check_token, hold_s, json_body
from deploy.gateway.hooks.webhooks import Webhooks
from deploy.gateway.keeping.journal import Journal
from deploy.gateway.keeping.journal_file import JournalError
from deploy.gateway.keeping.outputs import MEDIA_TYPES
from deploy.gateway.life.predictions import Predictions
from deploy.gateway.life.refusals import DrainingError, QueueFullError
from deploy.gateway.prediction import Prediction
from deploy.gateway.settings import GatewaySettings
from dmd2.errors import InvalidRequestError

log = logging.getLogger(__name__)

DRAINING_RETRY_S = 5
# How long a cancelled prediction may take to end before the answer says that it is under way.
_CANCELED_WITHIN_S = 5.0

Endpoint = Callable[[Request], Awaitable[Response]]


def routes(
    dialect: ReplicateDialect,
    predictions: Predictions,
    webhooks: Webhooks,
    journal: Journal,
    settings: GatewaySettings,
) -> list[BaseRoute]:
    """All routes of the dialect, which see to their authentication themselves."""
    v1 = _V1(dialect, predictions, webhooks, settings)
    files = _Files(journal, settings)
    return [Mount("/v1", app=v1.app()), Route(OUTPUTS_PATH + "/{name}", files.get)]


class _V1:
    """What is below /v1."""

    def __init__(
        self,
        dialect: ReplicateDialect,
        predictions: Predictions,
        webhooks: Webhooks,
        settings: GatewaySettings,
    ) -> None:
        self._dialect, self._predictions = dialect, predictions
        self._webhooks, self._token = webhooks, settings.api_token

    def app(self) -> ASGIApp:
        """It, for those who bear the token, with its own way to say what is wrong."""
        table: list[tuple[str, str, Endpoint]] = [
            ("POST", "/predictions", self._create),
            ("GET", "/predictions", self._list),
            ("GET", "/predictions/{id}", self._get),
            ("POST", "/predictions/{id}/cancel", self._cancel),
            ("POST", "/models/{owner}/{name}/predictions", self._create),
            ("POST", "/deployments/{owner}/{name}/predictions", self._create),
            ("GET", "/models/{owner}/{name}", self._model),
            ("GET", "/models/{owner}/{name}/versions", self._versions),
            ("GET", "/models/{owner}/{name}/versions/{id}", self._version),
            ("GET", "/account", self._account),
            ("GET", "/webhooks/default/secret", self._secret),
        ]
        known = ", ".join(f"{verb} /v1{path}" for verb, path, _ in table)

        async def unknown(_: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            title = "Not found" if error.status_code == 404 else "Method not allowed"
            return Problem(error.status_code, title, f"This gateway has {known}.").response()

        routes = [Route(path, endpoint, methods=[verb]) for verb, path, endpoint in table]
        handlers = {Problem: _told, HTTPException: unknown, Exception: _broken}
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return _Guarded(app, self._token)

    async def _create(self, request: Request) -> Response:
        arrived = asyncio.get_running_loop().time()
        wait_s = hold_s(request)
        model = None
        if "owner" in (path := request.path_params):
            await self._dialect.served_as(path["owner"], path["name"])
            model = f"{path['owner']}/{path['name']}"
        body = await json_body(request)
        prediction = await self._dialect.prediction(body, self._webhooks.hosts, model)
        await self._accept(prediction)
        if wait_s is not None:
            passed_s = asyncio.get_running_loop().time() - arrived
            await self._predictions.wait(prediction, max(0.0, wait_s - passed_s))
        return await self._answer(request, prediction, 201, is_just_created=True)

    async def _accept(self, prediction: Prediction) -> None:
        try:
            await self._predictions.accept(prediction)
        except QueueFullError as error:
            raise Problem(
                429, "Too many requests", str(error), retry_after_s=error.retry_after_s
            ) from None
        except DrainingError as error:
            raise Problem(503, "Ending", str(error), retry_after_s=DRAINING_RETRY_S) from None
        except JournalError as error:
            log.error("a prediction was refused: %s", error)
            said = "The prediction could not be written down, and was not accepted."
            raise Problem(503, "No journal", said, retry_after_s=DRAINING_RETRY_S) from None

    async def _get(self, request: Request) -> Response:
        return await self._answer(request, self._found(request))

    async def _cancel(self, request: Request) -> Response:
        prediction = self._found(request)
        if self._predictions.cancel(prediction.id):
            await self._predictions.wait(prediction, _CANCELED_WITHIN_S)
        return await self._answer(request, prediction)

    async def _list(self, request: Request) -> Response:
        try:
            found, newer, older = self._predictions.page(request.query_params.get("cursor"))
        except InvalidRequestError as error:
            raise invalid_request(error) from None
        base_url = self._base_url(request)
        entries = [await self._dialect.entry(each, base_url) for each in found]
        pages = {
            name: None if cursor is None else f"{base_url}/v1/predictions?cursor={cursor}"
            for name, cursor in (("previous", newer), ("next", older))
        }
        head = json.dumps(pages).encode()[:-1]
        return _json(head + b', "results": [' + b", ".join(entries) + b"]}")

    async def _model(self, request: Request) -> Response:
        owner, name = request.path_params["owner"], request.path_params["name"]
        served = await self._dialect.served_as(owner, name)
        run_count = sum(self._predictions.ended.values())
        return _json(served.model_object(owner, name, self._base_url(request), run_count))

    async def _versions(self, request: Request) -> Response:
        path = request.path_params
        served = await self._dialect.served_as(path["owner"], path["name"])
        return _json({"previous": None, "next": None, "results": [served.version_object()]})

    async def _version(self, request: Request) -> Response:
        path = request.path_params
        served = await self._dialect.served_as(path["owner"], path["name"])
        if path["id"] != served.version:
            raise not_found("The version")
        return _json(served.version_object())

    async def _account(self, _: Request) -> Response:
        return _json(ACCOUNT)

    async def _secret(self, _: Request) -> Response:
        return _json({"key": self._webhooks.secret.text})

    def _found(self, request: Request) -> Prediction:
        prediction = self._predictions.find(request.path_params["id"])
        if prediction is None:
            raise not_found("The prediction")
        return prediction

    def _base_url(self, request: Request) -> str:
        return self._dialect.base_url(f"{request.url.scheme}://{request.url.netloc}")

    async def _answer(
        self,
        request: Request,
        prediction: Prediction,
        status: int = 200,
        is_just_created: bool = False,
    ) -> Response:
        base_url = self._base_url(request)
        return _json(await self._dialect.body(prediction, base_url, is_just_created), status)


class _Guarded:
    """An app for those who bear the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http":
                check_token(Request(scope), self._token)
        except Problem as problem:
            await problem.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Files:
    """Outputs, for those who know their names."""

    def __init__(self, journal: Journal, settings: GatewaySettings) -> None:
        self._outputs, self._is_open = journal.outputs, bool(settings.public_url)

    async def get(self, request: Request) -> Response:
        """The file."""
        path = self._outputs.path(request.path_params["name"]) if self._is_open else None
        if path is None:
            return not_found("The file").response()
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return FileResponse(path, headers=headers, media_type=MEDIA_TYPES[path.suffix])


def _json(said: dict[str, Any] | bytes, status: int = 200) -> Response:
    content = said if isinstance(said, bytes) else json.dumps(said).encode()
    return Response(content, status, media_type="application/json")


async def _told(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem.response()


async def _broken(_: Request, error: Exception) -> Response:
    """Starlette passes the error on to the log."""
    return Problem(500, "Internal error", "The gateway failed. Its log says why.").response()
