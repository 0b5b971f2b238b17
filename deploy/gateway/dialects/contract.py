"""What both dialects ask of a request: its size, its inputs, its id, and what engines get of it.

The inputs are those of predict.py, whose signature is read, not run; their rules beyond that are
those of dmd2/request. There is no other list of them.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cog_config import cog_config
from cog_schema import build_schema
from starlette.requests import Request

from deploy.gateway.work import Work
from dmd2.errors import InvalidRequestError
from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraInputs
from dmd2.settings import ROOT

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1_000_000
IDS = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_NAMED = 5


class BodyTooLargeError(Exception):
    """A body has more than MAX_BODY_BYTES."""


async def read_body(request: Request) -> bytes:
    """A request's body; what is too large is read no further than that shows.

    Raises:
        BodyTooLargeError: it is.
        ClientDisconnect: the client left.
    """
    parts, num_bytes = [], 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > MAX_BODY_BYTES:
            raise BodyTooLargeError
        parts.append(part)
    return b"".join(parts)


@dataclass(frozen=True)
class Fault:
    """What is wrong with an input by its schema.

    Attributes:
        field: the input; "__root__" for all of them together.
        value: that was given, if there was one.
        limit: what the value is, or is not; None where it is missing.
    """

    field: str
    value: object
    limit: str | None

    @property
    def message(self) -> str:
        """In the words of Cog's server."""
        return "Field required" if self.limit is None else f"{_shown(self.value)} {self.limit}"


class Contract:
    """What a request must be.

    Args:
        cell: what the ids that are given begin with; "" for nothing.

    Attributes:
        schema: the OpenAPI document that Cog's server shows.
        cog_version: of Cog, that the container has.
    """

    def __init__(self, cell: str = "") -> None:
        source = (ROOT / "predict.py").read_text(encoding="utf-8")
        self.schema: Mapping[str, Any] = build_schema(source)
        self.cog_version: str = cog_config()["build"]["sdk_version"]
        self._schemas: dict[str, Any] = self.schema["components"]["schemas"]
        self._inputs: dict[str, Any] = self._schemas["Input"]["properties"]
        self._cell = f"{cell}-" if cell else ""

    def new_id(self) -> str:
        """An id that nobody has."""
        return f"{self._cell}{secrets.token_hex(13)}"

    def faults(self, inputs: object) -> list[Fault]:
        """What is wrong with inputs by their schema, by field; those that are unknown are not."""
        if not isinstance(inputs, dict):
            return [Fault("__root__", inputs, 'is not of type "object"')]
        wrong = [
            Fault(name, inputs[name], limit)
            for name in sorted(self._inputs.keys() & inputs.keys())
            for limit in _broken(inputs[name], self._schema_of(name))
        ]
        missing = [name for name in self._schemas["Input"]["required"] if name not in inputs]
        return wrong + [Fault(name, None, None) for name in missing]

    def known(self, id: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that exist; the log names some of the others, and none of their values."""
        unknown = [ascii(name)[:40] for name in inputs if name not in self._inputs]
        if unknown:
            more = ", ..." if len(unknown) > _MAX_NAMED else ""
            named = ", ".join(unknown[:_MAX_NAMED]) + more
            log.warning("prediction %s: unknown inputs are left out: %s", id, named)
        return {name: value for name, value in inputs.items() if name in self._inputs}

    def work(
        self, id: str, inputs: Mapping[str, Any], card: ModelCard
    ) -> tuple[Work, dict[str, Any]]:
        """What an engine is asked, its seed drawn, and the inputs that exist.

        Raises:
            InvalidRequestError: an input breaks its rule.
        """
        for fault in self.faults(inputs):
            limit = "it is required" if fault.limit is None else f"it {fault.limit}"
            remedy = "Send what the schema at /openapi.json allows"
            raise InvalidRequestError(fault.field, fault.value, limit, remedy)
        known = self.known(id, inputs)
        given = dict(known)
        loras = LoraInputs.taken_from(given)
        return Work(id, GenerationRequest.resolve(card, **given), loras), known

    def _schema_of(self, name: str) -> dict[str, Any]:
        schema: dict[str, Any] = self._inputs[name]
        return schema | (self._schemas[name] if "allOf" in schema else {})


def _broken(value: object, schema: Mapping[str, Any]) -> Iterator[str]:
    """What a value is or is not against its schema, in the order of that one's words."""
    if "enum" in schema and value not in schema["enum"]:
        yield f"is not one of {_shown(schema['enum'])}"
    if isinstance(value, str):
        longest, shortest = schema.get("maxLength"), schema.get("minLength")
        if longest is not None and len(value) > longest:
            yield f"is longer than {longest} characters"
        if shortest is not None and len(value) < shortest:
            yield f"is shorter than {shortest} character{'' if shortest == 1 else 's'}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value > schema.get("maximum", value):
            yield f"is greater than the maximum of {schema['maximum']}"
        if value < schema.get("minimum", value):
            yield f"is less than the minimum of {schema['minimum']}"
    if not _is_a(value, schema["type"]):
        yield f'is not of type "{schema["type"]}"'


def _is_a(value: object, type: str) -> bool:
    """Whether a value is of one of JSON Schema's types; 2.0 is an integer, true is none."""
    if type == "boolean" or isinstance(value, bool):
        return type == "boolean" and isinstance(value, bool)
    if type == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, str if type == "string" else int | float)


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def is_json(content_type: str) -> bool:
    """Whether a body of this Content-Type may be read as JSON."""
    kind = content_type.partition(";")[0].strip().lower()
    main, _, sub = kind.partition("/")
    return main == "application" and (sub == "json" or sub.endswith("+json"))
