"""Cog's dialect over HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from deploy.gateway.dialects import cog_dialect
from deploy.gateway.dialects.cog_dialect import Refusal, invalid, unable
from deploy.gateway.dialects.contract import BodyTooLargeError, Contract, read_body
from deploy.gateway.hooks.webhook_hosts import WebhookHosts
from deploy.gateway.keeping.journal_file import JournalError
from deploy.gateway.keeping.kept_work import shown_inputs
from deploy.gateway.keeping.outputs import Outputs
from deploy.gateway.life.life import End
from deploy.gateway.life.predictions import Predictions
from deploy.gateway.life.readiness import Readiness
from deploy.gateway.life.refusals import DrainingError, QueueFullError
from deploy.gateway.prediction import EVENTS, Prediction, Webhook
from dmd2.errors import InvalidRequestError

log = logging.getLogger(__name__)

RETRY_S = 5
# A client who has left reads no answer; nginx calls it so.
_LEFT = 499


@dataclass(frozen=True)
class Asked:
    """A request that is to be done.

    Attributes:
        id: that its client calls the prediction by, and is answered with.
        prediction: which has another id where a prediction of that one is under way; a client that
            does not wait is told that one.
        is_async: whether its client does not wait.
        end: that it comes to at once where it breaks a rule beside the schema: it fails, as the
            engine would have it, which is not asked.
    """

    id: str
    prediction: Prediction
    is_async: bool
    end: End | None


class CogRoutes:
    """The routes of predictions."""

    def __init__(
        self,
        contract: Contract,
        readiness: Readiness,
        predictions: Predictions,
        outputs: Outputs,
        hosts: WebhookHosts,
    ) -> None:
        self._contract, self._readiness = contract, readiness
        self._predictions, self._outputs, self._hosts = predictions, outputs, hosts

    def routes(self) -> list[Route]:
        """All of them; what they refuse they raise as Refusal."""
        return [
            Route("/predictions", self._create, methods=["POST"]),
            Route("/predictions/{id}", self._create, methods=["PUT"]),
            Route("/predictions/{id}/cancel", self._cancel, methods=["POST"]),
        ]

    async def body(self, prediction: Prediction, id: str | None = None) -> bytes:
        """A prediction as its webhook is told of it, or under the id that its client gave it.

        Raises:
            OutputsError: its outputs were deleted.
        """
        outputs = await self._outputs.of(prediction) if prediction.status == "succeeded" else ()
        return cog_dialect.body_of(prediction, outputs, id)

    async def _create(self, request: Request) -> Response:
        began = time.perf_counter()
        try:
            body = await read_body(request)
        except BodyTooLargeError:
            raise unable(413, "the body is larger than 1 MB; its inputs never are") from None
        except ClientDisconnect:
            return Response(status_code=_LEFT)
        fields = cog_dialect.asked_by(body, request.headers.get("Content-Type"))
        in_path = request.path_params.get("id")
        given = cog_dialect.id_asked(fields, in_path)
        if in_path is not None and self._predictions.is_under_way(in_path):
            return self._state(in_path)
        if "text/event-stream" in request.headers.get("Accept", ""):
            raise Refusal(406, {"error": cog_dialect.NO_STREAM})
        asked = self._asked(request, fields, given, began)
        await self._accept(asked)
        return await self._answer(request, asked)

    def _state(self, id: str) -> Response:
        prediction = self._predictions.find(id)
        assert prediction is not None
        return _json(cog_dialect.state_of(prediction), 202)

    def _asked(
        self, request: Request, fields: dict[str, object], given: str | None, began: float
    ) -> Asked:
        """What a request asks for."""
        if (card := self._readiness.card) is None:
            raise unable(503, cog_dialect.NOT_READY)
        inputs = {} if fields.get("input") is None else fields["input"]
        cog_dialect.check_inputs(self._contract.faults(inputs))
        assert isinstance(inputs, dict)
        id = given
        if id is None or self._predictions.is_under_way(id):
            id = self._contract.new_id()
        is_async = request.headers.get("Prefer") == "respond-async"
        known = self._contract.known(id, inputs)
        prediction = Prediction(
            id=id,
            dialect="cog",
            inputs=shown_inputs(known),
            work=None,
            webhook=self._webhook(fields),
            is_journaled=is_async,
        )
        end = None
        try:
            prediction.work, _ = self._contract.work(id, known, card)
        except InvalidRequestError as error:
            end = End.of(cog_dialect.refused_outcome(error, time.perf_counter() - began))
        return Asked(given or id, prediction, is_async, end)

    def _webhook(self, fields: dict[str, object]) -> Webhook | None:
        try:
            return self._hosts.asked(fields, EVENTS)
        except InvalidRequestError as error:
            raise invalid(error.field, str(error)) from None

    async def _accept(self, asked: Asked) -> None:
        if self._readiness.status == "UNHEALTHY":
            raise unable(503, "No engine is ready. Try again later.", RETRY_S)
        try:
            await self._predictions.accept(asked.prediction, asked.end)
        except QueueFullError as error:
            raise unable(409, str(error), error.retry_after_s) from None
        except DrainingError as error:
            raise unable(503, str(error), RETRY_S) from None
        except JournalError as error:
            log.error("a prediction was refused: %s", error)
            said = "the prediction could not be written down, and was not accepted"
            raise unable(503, said, RETRY_S) from None

    async def _answer(self, request: Request, asked: Asked) -> Response:
        prediction = asked.prediction
        if asked.is_async:
            return _json(cog_dialect.started(prediction.id), 202)
        if not await self._ended(request, prediction):
            self._predictions.cancel(prediction.id)
            return Response(status_code=_LEFT)
        return _json(await self.body(prediction, asked.id))

    async def _ended(self, request: Request, prediction: Prediction) -> bool:
        """Wait for a prediction's end; whether it came before its client left."""
        ending = asyncio.create_task(self._predictions.wait(prediction, None))
        leaving = asyncio.create_task(_left(request))
        try:
            await asyncio.wait({ending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return prediction.is_over
        finally:
            ending.cancel()
            leaving.cancel()

    async def _cancel(self, request: Request) -> Response:
        is_cancelled = self._predictions.cancel(request.path_params["id"])
        return _json(b"{}", 200 if is_cancelled else 404)


async def _left(request: Request) -> None:
    """Return once a request's client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(content: bytes, status: int = 200) -> Response:
    return Response(content, status, media_type="application/json")
