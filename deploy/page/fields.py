"""The server's inputs as fields of a form, and a filled form as the inputs of a request."""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["text", "secret", "choice", "toggle", "integer", "number", "picture"]
_NUMBERS: dict[str, Kind] = {"integer": "integer", "number": "number", "boolean": "toggle"}
_TEXTS: dict[str, Kind] = {"password": "secret", "uri": "picture"}
_SPELLED = {"num": "number of", "lora": "LoRA", "api": "API", "hf": "HF"}
_WHOLE = re.compile(r"[-+]?[0-9]+")
_DECIMAL = re.compile(r"[-+]?([0-9]+[.]?[0-9]*|[.][0-9]+)(e[-+]?[0-9]{1,2})?", re.IGNORECASE)


@dataclass(frozen=True)
class Field:
    """One input of the server.

    Attributes:
        name: as requests have it.
        kind: what fills it in.
        description: the server's own, "" where it has none.
        default: None where leaving it out is the default.
        is_required: whether a request without it is refused.
        choices: all that are allowed, of a choice.
        minimum, maximum: bounds of a number, None where there are none.
        max_length: of a text, None where there is none.
    """

    name: str
    kind: Kind
    description: str = ""
    default: Any = None
    is_required: bool = False
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    max_length: int | None = None

    @property
    def label(self) -> str:
        """The name for a reader."""
        words = " ".join(_SPELLED.get(word, word) for word in self.name.split("_"))
        return words[:1].upper() + words[1:]

    @property
    def hint(self) -> str:
        """The description, bounds and default in one line."""
        return " · ".join(filter(None, (self.description, self._bounds(), self._default())))

    def _bounds(self) -> str:
        match self.minimum, self.maximum:
            case None, None:
                return "" if self.max_length is None else f"up to {self.max_length} characters"
            case low, None:
                return f"at least {low:.10g}"
            case None, high:
                return f"at most {high:.10g}"
            case low, high:
                return f"{low:.10g} to {high:.10g}"

    def _default(self) -> str:
        if self.is_required:
            return "required"
        if self.kind == "toggle":
            return f"{'on' if self.default else 'off'} by default"
        if self.default is None or self.default == "":
            return "may be left empty"
        return f"default {self.default}"


def fields_of(openapi: Mapping[str, Any]) -> tuple[list[Field], list[str]]:
    """All inputs in the server's order that a form can take, and the names of all others.

    Raises:
        KeyError: the document describes no inputs.
    """
    schemas = openapi["components"]["schemas"]
    properties: Mapping[str, Any] = schemas["Input"]["properties"]
    required = schemas["Input"].get("required", [])
    ordered = sorted(properties, key=lambda name: properties[name].get("x-order", len(properties)))
    fields, others = [], []
    for name in ordered:
        schema = _whole(properties[name], schemas)
        kind = _kind_of(schema)
        if kind is None:
            others.append(name)
        else:
            fields.append(_field(name, kind, schema, name in required))
    return fields, others


def _whole(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """A property with what it refers to; what stands in the property itself wins."""
    merged: dict[str, Any] = {}
    parts = [*schema.get("allOf", []), *schema.get("anyOf", [])]
    if "$ref" in schema:
        parts.append(schemas[schema["$ref"].rpartition("/")[2]])
    for part in parts:
        if part.get("type") != "null":
            merged |= _whole(part, schemas)
    return merged | {key: schema[key] for key in schema if key not in ("allOf", "anyOf", "$ref")}


def _kind_of(schema: Mapping[str, Any]) -> Kind | None:
    if "enum" in schema or _is_open(schema):
        return "choice"
    if schema.get("type") == "string":
        return _TEXTS.get(schema.get("format", ""), "text")
    return _NUMBERS.get(schema.get("type", ""))


def _is_open(schema: Mapping[str, Any]) -> bool:
    """Whether this is yes, no or neither."""
    return schema.get("type") == "boolean" and schema.get("default") is None


def _field(name: str, kind: Kind, schema: Mapping[str, Any], is_required: bool) -> Field:
    return Field(
        name=name,
        kind=kind,
        description=schema.get("description", ""),
        default=schema.get("default"),
        is_required=is_required,
        choices=tuple(schema.get("enum", (True, False) if kind == "choice" else ())),
        minimum=schema.get("minimum"),
        maximum=schema.get("maximum"),
        max_length=schema.get("maxLength"),
    )


def inputs_of(fields: Sequence[Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """What a request says: all that is required or not the default. The server judges it."""
    inputs = {}
    for field in fields:
        value = _as_json(field, values.get(field.name))
        if value is not None and (field.is_required or value != field.default):
            inputs[field.name] = value
    return inputs


def _as_json(field: Field, value: Any) -> Any:
    """A form's value as a request has it; None leaves it out."""
    if field.kind == "picture":
        return None if value is None else data_url(Path(value))
    if field.kind == "secret" or (field.kind == "text" and field.default is None):
        return value if value or field.is_required else None
    if field.kind in ("integer", "number"):
        return _as_number(value)
    return value


def _as_number(value: Any) -> Any:
    """A number that was typed or slid; what is none stays as it is, for the server to refuse."""
    if isinstance(value, float) and value.is_integer():
        return int(value)  # a browser has one kind of number
    if not isinstance(value, str):
        return value
    text = value.strip()
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) else text or None


def data_url(file: Path) -> str:
    """A file as the URL that a request brings along."""
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def form_values(fields: Sequence[Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """What to remember of a filled form: all but its secrets."""
    return {f.name: values.get(f.name) for f in fields if f.kind != "secret"}
