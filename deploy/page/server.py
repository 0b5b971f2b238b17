"""The server over HTTP: what it is, one prediction, cancelling it. Errors are the server's words."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

TICK_S = 0.5
# Of a server that is full: asked again at first after so long, later at this.
_FIRST_WAIT_S, _LAST_WAIT_S = 0.25, 2.0
_FULL = (409, 429)
_CONNECT_S = 10.0
_LOADED = re.compile(r"loaded (\S+) on (\S+) as")
_MOST_SHOWN = 600


class ServerError(Exception):
    """The server cannot be used; the message says why, and what helps."""


@dataclass(frozen=True)
class Health:
    """What the server says of itself.

    Attributes:
        status: Cog's word, such as READY.
        model: what it loaded, "" where it does not say.
        device: where to, likewise.
        logs: of its setup.
    """

    status: str
    model: str = ""
    device: str = ""
    logs: str = ""


@dataclass(frozen=True)
class Tick:
    """A prediction is under way.

    Attributes:
        seconds: since it was asked for, or since the server took it.
        is_waiting: whether the server is full, so that it was not taken yet.
    """

    seconds: float
    is_waiting: bool


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


class _Request:
    """Whether a request was taken, and since when the server or its queue has it."""

    def __init__(self) -> None:
        self.is_waiting = False
        self.since = time.monotonic()


class Server:
    """A server at an address, which it and nobody else is asked at.

    Args:
        url: where it listens, with http:// or https://.
        token: sent as Bearer token with each request; "" for none.
    """

    def __init__(self, url: str, token: str = "") -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def _client(self, timeout_s: float | None) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S),
            trust_env=False,
        )

    async def health(self) -> Health:
        """What the server says of itself.

        Raises:
            ServerError: it cannot be reached, or refuses.
        """
        body = await self._get("/health-check")
        logs = (body.get("setup") or {}).get("logs") or ""
        loaded = _LOADED.search(logs)
        model, device = loaded.groups() if loaded else ("", "")
        return Health(str(body.get("status", "")), model, device, logs)

    async def openapi(self) -> dict[str, Any]:
        """The server's description of its inputs.

        Raises:
            ServerError: it cannot be reached, or refuses.
        """
        return await self._get("/openapi.json")

    async def _get(self, path: str) -> dict[str, Any]:
        try:
            async with self._client(30.0) as client:
                response = await client.get(path)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ServerError(self._unreachable(error)) from error
        if not response.is_success:
            raise ServerError(refusal(response))
        body = _json(response)
        if not isinstance(body, dict):
            raise ServerError(f"{self.url}{path} is no answer of a Cog server")
        return body

    async def predict(
        self, prediction_id: str, inputs: Mapping[str, Any], is_wanted: Callable[[], bool]
    ) -> AsyncIterator[Tick | Answer]:
        """Ticks while the prediction is under way, then its answer.

        A full server is asked again until it takes the request. Once is_wanted() is false, the
        prediction is cancelled; so it is when this is closed before its end.
        """
        request = _Request()
        asking = asyncio.create_task(self._ask(prediction_id, inputs, request))
        try:
            while True:
                done, _ = await asyncio.wait({asking}, timeout=TICK_S)
                if done:
                    yield asking.result()
                    return
                if not is_wanted():
                    if request.is_waiting or not await self.cancel(prediction_id):
                        yield CANCELED
                        return
                yield Tick(time.monotonic() - request.since, request.is_waiting)
        finally:
            asking.cancel()  # which closes the connection, and so cancels at the server

    async def cancel(self, prediction_id: str) -> bool:
        """Cancel a prediction; whether the server had it."""
        try:
            async with self._client(_CONNECT_S) as client:
                response = await client.post(f"/predictions/{prediction_id}/cancel")
        except httpx.TransportError:
            return False
        return response.is_success

    async def _ask(
        self, prediction_id: str, inputs: Mapping[str, Any], request: _Request
    ) -> Answer:
        pause_s = _FIRST_WAIT_S
        try:
            async with self._client(None) as client:
                while True:
                    response = await client.put(
                        f"/predictions/{prediction_id}", json={"input": dict(inputs)}
                    )
                    if response.status_code not in _FULL:
                        return answer_of(response)
                    request.is_waiting = True
                    if (status := (await self.health()).status) not in ("READY", "BUSY"):
                        return Answer("failed", error=f"The server takes no requests: {status}")
                    await asyncio.sleep(max(pause_s, _retry_after_s(response)))
                    pause_s = min(2 * pause_s, _LAST_WAIT_S)
        except httpx.TransportError as error:
            return Answer("failed", error=self._unreachable(error))
        except ServerError as error:
            return Answer("failed", error=str(error))

    def _unreachable(self, error: Exception) -> str:
        return f"No server answers at {self.url} ({error or type(error).__name__}). Is it running?"


def _retry_after_s(response: httpx.Response) -> float:
    """How long the server asks to wait; 0 where it does not say so in seconds."""
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), 60.0) if asked.isdecimal() else 0.0


def answer_of(response: httpx.Response) -> Answer:
    """A server's response to a prediction."""
    body = _json(response)
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
    match = re.match(r"data:image/([a-z]+);base64,", url)
    if match is None:
        raise ValueError(f"The server sent no picture but {url[:60]!r}; the page fetches none")
    suffix = {"jpeg": ".jpg"}.get(match[1], f".{match[1]}")
    return base64.b64decode(url[match.end() :], validate=True), suffix


def refusal(response: httpx.Response) -> str:
    """Why a server refused, in its words; of a lacking token, what helps."""
    body = _json(response)
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


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None
