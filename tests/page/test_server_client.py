"""One prediction as the page asks for it: waiting, cancelling, and errors in the server's words."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page.fake_server import PNG, FakeServer, data_url, fake_server, succeeded

from deploy.page import server as server_module
from deploy.page.answers import Answer
from deploy.page.server import Server, ServerError, Tick, pauses_s


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(server_module, "TICK_S", 0.02)
    with fake_server() as fake:
        yield fake


def ask(
    server: Server, is_wanted: Callable[[list[Tick]], bool] = lambda _: True, **inputs: Any
) -> tuple[Answer, list[Tick]]:
    """A prediction to its end, and the ticks before it."""
    ticks: list[Tick] = []

    async def to_the_end() -> Answer:
        async with asyncio.timeout(20):
            async for event in server.predict("some-id", inputs, lambda: is_wanted(ticks)):
                if isinstance(event, Answer):
                    return event
                ticks.append(event)
        raise AssertionError("it ended without an answer")

    return asyncio.run(to_the_end()), ticks


def test_pictures_come_as_the_server_made_them(fake: FakeServer) -> None:
    fake.answers = [succeeded(data_url(), data_url(b"j", "jpeg"), seeds=[5, 6])]
    answer, _ = ask(Server(fake.url + "/", "to ken"), prompt="x", seed=5)
    assert answer.pictures == [(PNG, ".png"), (b"j", ".jpg")]
    ((method, path, body, headers),) = fake.requests
    assert (method, path) == ("PUT", "/predictions/some-id")
    assert body == {"input": {"prompt": "x", "seed": 5}}
    assert headers["Authorization"] == "Bearer to ken"


def test_without_a_token_none_is_sent(fake: FakeServer) -> None:
    fake.answers = [succeeded(data_url())]
    ask(Server(fake.url))
    assert "Authorization" not in fake.requests[0][3]


def test_a_full_server_is_asked_less_and_less_often() -> None:
    assert list(itertools.islice(pauses_s(), 6)) == [0.25, 0.5, 1, 2, 2, 2]


def test_a_full_server_is_asked_again(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_FIRST_WAIT_S", 0.05)
    fake.answers = [(409, {"detail": "full"})] * 3 + [succeeded(data_url())]
    started = time.monotonic()
    answer, ticks = ask(Server(fake.url))
    assert answer.status == "succeeded"
    assert len(fake.asked("PUT")) == 4
    assert time.monotonic() - started >= 0.05 + 0.1 + 0.2
    assert any(tick.is_waiting for tick in ticks), "and the page can say so"


def test_a_full_server_that_takes_it_is_no_longer_waited_for(fake: FakeServer) -> None:
    fake.answers = [(409, {}), None]

    def is_wanted(ticks: list[Tick]) -> bool:
        waited = [tick.is_waiting for tick in ticks]
        return not (any(waited) and waited[-5:] == [False] * 5)

    answer, _ = ask(Server(fake.url), is_wanted)
    assert answer.status == "canceled"
    assert fake.cancelled.is_set(), "it was cancelled where it is"


def test_the_pause_is_at_least_what_the_server_asks_for(fake: FakeServer) -> None:
    fake.answers = [(429, {}), succeeded(data_url())]
    fake.reply_headers["Retry-After"] = "1"
    started = time.monotonic()
    assert ask(Server(fake.url))[0].status == "succeeded"
    assert time.monotonic() - started >= 1


def test_a_server_that_takes_nothing_is_not_asked_for_ever(fake: FakeServer) -> None:
    fake.answers, fake.health = [(409, {})], "DEFUNCT"
    answer, _ = ask(Server(fake.url))
    assert answer.error == "The server takes no requests: DEFUNCT"


def test_cancelling_while_it_waits_asks_no_more(fake: FakeServer) -> None:
    fake.answers = [(409, {})]
    answer, _ = ask(Server(fake.url), is_wanted=lambda ticks: len(ticks) < 3)
    assert answer.status == "canceled"
    asked = len(fake.asked("PUT"))
    time.sleep(0.6)
    assert len(fake.asked("PUT")) == asked


def test_cancelling_at_work_tells_the_server_by_its_id(fake: FakeServer) -> None:
    answer, ticks = ask(Server(fake.url), is_wanted=lambda ticks: len(ticks) < 3)
    assert answer.status == "canceled"
    assert ("POST", "/predictions/some-id/cancel") in [request[:2] for request in fake.requests]
    assert not ticks[-1].is_waiting


REFUSALS: list[tuple[tuple[int, Any], str]] = [
    (
        (422, {"detail": [{"loc": ["body", "input", "seed"], "msg": "'x' is no integer"}]}),
        "seed: 'x' is no integer",
    ),
    (
        (200, {"status": "failed", "error": "width: 100 is not allowed"}),
        "width: 100 is not allowed",
    ),
    ((200, {"status": "failed"}), "The server ended it as 'failed' and said no more"),
    ((202, {"status": "starting"}), "The server ended it as 'starting' and said no more"),
    ((401, {"detail": "no token"}), "DMD2_API_TOKEN"),
    ((503, {"title": "setup failed"}), "HTTP 503: setup failed"),
    ((500, b"<html>broken</html>"), "HTTP 500: <html>broken</html>"),
    ((200, b"not JSON"), "HTTP 200: not JSON"),
    (succeeded("https://elsewhere.example/a.png"), "sent no picture but 'https://elsewhere"),
    (succeeded("data:image/png;base64,?"), "base64"),
    (succeeded("data:image/html;base64,PGI+"), "sent no picture but 'data:image/html"),
]


@pytest.mark.parametrize(("reply", "said"), REFUSALS)
def test_an_error_is_told_in_the_servers_words(
    fake: FakeServer, reply: tuple[int, Any], said: str
) -> None:
    fake.answers = [reply]
    answer, _ = ask(Server(fake.url))
    assert answer.status == "failed"
    assert said in answer.error
    assert answer.pictures == []


def test_a_server_that_is_gone_is_named() -> None:
    with fake_server() as fake:
        pass
    answer, _ = ask(Server(fake.url))
    assert fake.url in answer.error
    with pytest.raises(ServerError, match="Is it running"):
        asyncio.run(Server(fake.url).health())


def test_health_tells_the_model_and_its_device(fake: FakeServer) -> None:
    health = asyncio.run(Server(fake.url).health())
    assert (health.status, health.model, health.device) == ("READY", "sdxl-4step", "cuda")


def test_what_is_no_cog_server_is_told_so(fake: FakeServer) -> None:
    fake.openapi = []  # type: ignore[assignment]
    with pytest.raises(ServerError, match=r"no answer of a Cog server"):
        asyncio.run(Server(fake.url).openapi())
