"""How a prediction ended: pictures as the server made them, errors in the server's words."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

_MOST_SHOWN = 600
# What the page shows beside its own HTML must not be HTML.
_PICTURES = {"data:image/png": ".png", "data:image/jpeg": ".jpg", "data:image/webp": ".webp"}


@dataclass(frozen=True)
class Answer:
    """How a prediction ended.

    Attributes:
        status: "succeeded", "failed", "canceled".
        pictures: the files, as the server made them, each with its suffix.
        error: the server's words; "" where there is none.
        metrics: the server's.
        notes: what else the server remarked.
    """

    status: str
    pictures: list[tuple[bytes, str]] = field(default_factory=list)
    error: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


CANCELED = Answer("canceled")


def answer_of(response: httpx.Response) -> Answer:
    """A server's response to a prediction."""
    body = json_of(response)
    if not response.is_success or not isinstance(body, dict) or "status" not in body:
        return Answer("failed", error=refusal(response))
    logs = body.get("logs") or ""
    notes = [line[6:] for line in logs.splitlines() if line.startswith("note: ")]
    metrics = body.get("metrics") or {}
    status, error = str(body["status"]), str(body.get("error") or "")
    if status != "succeeded":
        if status != "canceled":
            status, error = "failed", error or f"The server ended it as {status!r} and said no more"
        return Answer(status, error=error, metrics=metrics, notes=notes)
    output = body.get("output") or []
    try:
        pictures = [_picture(url) for url in ([output] if isinstance(output, str) else output)]
    except ValueError as wrong:
        return Answer("failed", error=str(wrong), metrics=metrics, notes=notes)
    return Answer(status, pictures, metrics=metrics, notes=notes)


def _picture(url: str) -> tuple[bytes, str]:
    """The bytes of a data URL, and the suffix for them."""
    kind, _, content = url.partition(";base64,")
    if kind not in _PICTURES:
        raise ValueError(f"The server sent no picture but {url[:60]!r}; the page fetches none")
    return base64.b64decode(content, validate=True), _PICTURES[kind]


def refusal(response: httpx.Response) -> str:
    """Why a server refused, in its words; of a lacking token, what helps."""
    body = json_of(response)
    said = _said(body) if isinstance(body, dict) else ""
    said = said or response.text.strip() or response.reason_phrase
    if response.status_code in (401, 403):
        said += ". Start the page with the server's token in DMD2_API_TOKEN"
    if response.status_code != 422:
        said = f"HTTP {response.status_code}: {said}"
    return said if len(said) <= _MOST_SHOWN else f"{said[:_MOST_SHOWN]} ..."


def _said(body: Mapping[str, Any]) -> str:
    """The text in an error: FastAPI's and Cog's list of them, or one."""
    detail = body.get("detail") or body.get("error") or body.get("title") or ""
    if isinstance(detail, list):
        return "\n".join(
            f"{each['loc'][-1]}: {each['msg']}"
            if isinstance(each, dict) and each.get("loc") and "msg" in each
            else json.dumps(each)
            for each in detail
        )
    return str(detail)


def json_of(response: httpx.Response) -> Any:
    """The body, None where it is no JSON."""
    try:
        return response.json()
    except ValueError:
        return None
