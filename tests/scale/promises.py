"""Predictions that a gateway has promised: answered 201 or 202, to be done whatever dies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import httpx
from soak.server_under_load import KnownRequest, http_client

# By their ids.
Promises = dict[str, KnownRequest]


class QueueFullError(Exception):
    """As many predictions wait as may, so this one is not promised."""


def by_cog(http: httpx.Client, id: str, inputs: dict[str, Any]) -> str:
    """The id of a prediction that Cog's dialect has promised.

    Raises:
        QueueFullError: it was refused.
    """
    body = {"id": id, "input": inputs}
    response = http.post("/predictions", json=body, headers={"Prefer": "respond-async"})
    if response.status_code == 409:
        raise QueueFullError(response.text)
    assert response.status_code == 202, response.text
    return id


def by_replicate(http: httpx.Client, _: str, inputs: dict[str, Any]) -> str:
    """The id of a prediction that Replicate's dialect has promised.

    Raises:
        QueueFullError: it was refused.
    """
    response = http.post("/v1/predictions", json={"version": "me/dmd2", "input": inputs})
    if response.status_code == 429:
        raise QueueFullError(response.text)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


DIALECTS = (by_cog, by_replicate)


@contextmanager
def promising(url: str, known: list[KnownRequest], name: str) -> Iterator[Promises]:
    """What is promised at an address, by both dialects, until the body ends.

    Or until nobody is there, or the queue is full: where the engines are dead, a fast machine
    fills it before the gateway has ended.
    """
    made: Promises = {}
    stopped = threading.Event()

    def make(ask: Callable[[httpx.Client, str, dict[str, Any]], str]) -> None:
        no_more = suppress(httpx.NetworkError, httpx.RemoteProtocolError, QueueFullError)
        with http_client(url) as http, no_more:
            for number in count():
                if stopped.is_set():
                    break
                each = known[number % len(known)]
                made[ask(http, f"{name}-{number}", each.inputs)] = each

    with ThreadPoolExecutor(len(DIALECTS)) as pool:
        making = [pool.submit(make, ask) for ask in DIALECTS]
        try:
            yield made
        finally:
            stopped.set()
        for each in making:
            each.result()
    assert made, "nothing was promised"
