"""Replicate's dialect, without HTTP: what is asked as predictions, and predictions as bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.gateway.dialects.contract import Contract
from deploy.gateway.dialects.replicate_bodies import (
    DEFAULT_EVENTS,
    ServedModel,
    prediction_object,
    written,
)
from deploy.gateway.dialects.replicate_problems import (
    InvalidField,
    Problem,
    invalid,
    invalid_request,
    invalid_version,
    not_found,
)
from deploy.gateway.hooks.webhook_hosts import WebhookHosts
from deploy.gateway.keeping.journal import Journal
from deploy.gateway.keeping.kept_work import shown_inputs
from deploy.gateway.keeping.outputs import OutputsError
from deploy.gateway.prediction import Prediction
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.work import Engines
from dmd2.errors import InvalidRequestError, ModelError

OUTPUTS_PATH = "/outputs"
_READY_WITHIN_S = 10.0


class ReplicateDialect:
    """Makes predictions of requests, and bodies of predictions.

    Args:
        engines: whose model is served.
        journal: has the outputs.
        contract: of the inputs.
    """

    def __init__(
        self, engines: Engines, settings: GatewaySettings, journal: Journal, contract: Contract
    ) -> None:
        self._engines, self._settings = engines, settings
        self._journal, self._contract = journal, contract
        self._served: ServedModel | None = None

    async def served(self) -> ServedModel:
        """The model.

        Raises:
            Problem: no engine is ready to say which.
        """
        if self._served is None:
            try:
                async with asyncio.timeout(_READY_WITHIN_S):
                    card = await self._engines.card()
            except (TimeoutError, ModelError):
                raise Problem(
                    503, "Not ready", "No engine is ready yet. Try again later.", retry_after_s=5
                ) from None
            contract = self._contract
            self._served = ServedModel(
                card, contract.schema, contract.cog_version, self._settings.serves
            )
        return self._served

    async def served_as(self, owner: str, name: str) -> ServedModel:
        """The model, if it answers to owner/name.

        Raises:
            Problem: it does not, or no engine is ready.
        """
        served = await self.served()
        if not served.answers_to(owner, name):
            raise not_found("The model")
        return served

    async def prediction(
        self, body: Mapping[str, Any], hosts: WebhookHosts, model: str | None
    ) -> Prediction:
        """What a request's body asks for.

        Args:
            body: of the request.
            hosts: that may be told.
            model: owner/name of the path; None has the body's `version` say it.

        Raises:
            Problem: the body breaks a rule.
        """
        served = await self.served()
        model = _model_of(body, served) if model is None else model
        inputs = body.get("input")
        if not isinstance(inputs, dict):
            raise invalid([InvalidField("input", "it is required, and must be an object")])
        if body.get("webhook_completed") is not None:
            remedy = "Use webhook, with webhook_events_filter ['completed']"
            raise invalid([InvalidField("webhook_completed", f"it is not known here. {remedy}.")])
        try:
            webhook = hosts.asked(body, DEFAULT_EVENTS)
        except InvalidRequestError as error:
            raise invalid_request(error) from None
        id = self._contract.new_id()
        try:
            work, known = self._contract.work(id, inputs, served.card)
        except InvalidRequestError as error:
            raise invalid_request(error, "input.") from None
        return Prediction(
            id=id,
            dialect="replicate",
            inputs=shown_inputs(known),
            work=work,
            model=model,
            version=served.version,
            webhook=webhook,
            is_journaled=True,
        )

    async def body(
        self, prediction: Prediction, base_url: str = "", is_just_created: bool = False
    ) -> bytes:
        """A prediction with its outputs, as an answer or a webhook has it.

        Args:
            prediction: the one.
            base_url: what its URLs begin with, where DMD2_PUBLIC_URL does not say.
            is_just_created: whether this answers the request that created it.
        """
        said = await self._said(prediction, base_url, is_just_created)
        outputs: Sequence[bytes] | None = None
        if prediction.status == "succeeded" and not prediction.is_removed:
            try:
                outputs = self._urls(prediction) or await self._journal.outputs.of(prediction)
            except OutputsError:  # between the look at the journal and at the disk
                said["data_removed"] = True
        return written(said, outputs)

    async def entry(self, prediction: Prediction, base_url: str) -> bytes:
        """A prediction in a list: its outputs are there as https URLs, or not at all.

        A hundred predictions with all their `data:` URLs would be a gigabyte.
        """
        said = await self._said(prediction, base_url, is_just_created=False)
        return written(said, self._urls(prediction) or None)

    def base_url(self, asked_at: str) -> str:
        """What URLs begin with.

        Args:
            asked_at: what the request's own URL begins with.
        """
        return self._settings.public_url or asked_at.rstrip("/")

    async def _said(
        self, prediction: Prediction, base_url: str, is_just_created: bool
    ) -> dict[str, Any]:
        base_url = self.base_url(base_url)
        return prediction_object(prediction, await self.served(), base_url, is_just_created)

    def _urls(self, prediction: Prediction) -> list[bytes]:
        """Of its outputs, below DMD2_PUBLIC_URL; none where that is not set."""
        if not self._settings.public_url:
            return []
        below = f"{self._settings.public_url}{OUTPUTS_PATH}"
        return [f"{below}/{name}".encode() for name in prediction.files]


def _model_of(body: Mapping[str, Any], served: ServedModel) -> str:
    """owner/name of the version that a body asks for."""
    version = body.get("version")
    if not isinstance(version, str):
        raise invalid([InvalidField("version", "it is required, and must be a string")])
    if (model := served.named_by(version)) is None:
        raise invalid_version(version, served.version)
    return model
