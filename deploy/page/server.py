"""The server over HTTP: what it is, one prediction, cancelling it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from deploy.page.answers import CANCELED, Answer, answer_of, json_of, refusal

TICK_S = 0.5
_FIRST_WAIT_S, _LAST_WAIT_S = 0.25, 2.0
_FULL = (409, 429)
_CONNECT_S = 10.0
_LOADED = re.compile(r"loaded (\S+) on (\S+) as")


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
        seconds: since it was asked for.
        is_waiting: whether the server is full, so that it was not taken yet.
    """

    seconds: float
    is_waiting: bool


class _Request:
    """Whether a request waits for a full server, and since when it is under way."""

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
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(self._unreachable(error)) from error
        if not response.is_success:
            raise ServerError(refusal(response))
        body = json_of(response)
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
                is_over = not is_wanted() and (
                    request.is_waiting or not await self.cancel(prediction_id)
                )
                if is_over:  # the server does not have it, and will not get it
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
        except httpx.HTTPError:
            return False
        return response.is_success

    async def _ask(
        self, prediction_id: str, inputs: Mapping[str, Any], request: _Request
    ) -> Answer:
        pauses = pauses_s()
        body = json.dumps({"input": dict(inputs)})
        try:
            async with self._client(None) as client:
                while True:
                    request.is_waiting = False  # a full server says so at once
                    response = await client.put(
                        f"/predictions/{prediction_id}",
                        content=body,
                        headers={"Content-Type": "application/json"},
                    )
                    if response.status_code not in _FULL:
                        return answer_of(response)
                    request.is_waiting = True
                    if (status := (await self.health()).status) not in ("READY", "BUSY"):
                        return Answer("failed", error=f"The server takes no requests: {status}")
                    await asyncio.sleep(max(next(pauses), _retry_after_s(response)))
        except httpx.HTTPError as error:
            return Answer("failed", error=self._unreachable(error))
        except ServerError as error:
            return Answer("failed", error=str(error))

    def _unreachable(self, error: Exception) -> str:
        return f"No server answers at {self.url} ({error or type(error).__name__}). Is it running?"


def pauses_s() -> Iterator[float]:
    """How long to wait before a full server is asked again: less and less often."""
    pause_s = _FIRST_WAIT_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, _LAST_WAIT_S)


def _retry_after_s(response: httpx.Response) -> float:
    """How long the server asks to wait; 0 where it does not say so in seconds."""
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), 60.0) if asked.isdecimal() else 0.0
