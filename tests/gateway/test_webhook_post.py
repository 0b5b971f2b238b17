"""One POST to a receiver, at allowed addresses, whatever it does."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest
from gateway.gateways import run
from gateway.webhook_world import (
    LONG,
    NO_ROOTS,
    SHORT,
    Answering,
    receiver,
)

from deploy.gateway.hooks.webhook_hosts import WebhookHosts
from deploy.gateway.hooks.webhook_post import Poster, PostError


def post(poster: Poster, listed: str, url: str, body: bytes = b"{}") -> Awaitable[None]:
    return poster.post(WebhookHosts([listed]).receiver(url), {}, body)


@pytest.mark.parametrize(
    "found",
    [
        ["127.0.0.1"],
        ["169.254.169.254"],
        ["10.0.0.1"],
        ["8.8.8.8", "192.168.1.1"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        [],
    ],
)
def test_a_name_that_leads_inside_is_not_connected_to(found: list[str]) -> None:
    async def test() -> None:
        async with receiver() as hook:
            poster = Poster(lambda _, port: [(ip, port) for ip in found], tls=NO_ROOTS, limits=LONG)
            url = f"http://hooks.test:{hook.port}"
            with pytest.raises(PostError, match="not at public addresses"):
                await post(poster, url, url)
            assert hook.posts == []
            poster.close()

    run(test)


def test_a_name_is_resolved_once_and_connected_to_as_resolved() -> None:
    async def test() -> None:
        async with receiver() as hook:
            answers = [["127.0.0.1"], ["10.0.0.1"]]  # a name that leads elsewhere the next time
            poster = Poster(
                lambda _, port: [(ip, port) for ip in answers.pop(0)],
                is_public=lambda ip: ip == "127.0.0.1",
                tls=NO_ROOTS,
                limits=LONG,
            )
            url = f"http://hooks.test:{hook.port}"
            await post(poster, url, url)
            assert hook.headers(0)["host"] == f"hooks.test:{hook.port}"
            assert answers == [["10.0.0.1"]]
            with pytest.raises(PostError, match="not at public addresses"):
                await post(poster, url, url)
            poster.close()

    run(test)


def test_a_listed_address_or_localhost_may_be_inside() -> None:
    async def test() -> None:
        async with receiver() as hook:
            poster = Poster(tls=NO_ROOTS, limits=LONG)
            for host in ("127.0.0.1", "localhost"):
                url = f"http://{host}:{hook.port}"
                await post(poster, url, url)
            assert len(hook.posts) == 2
            poster.close()

    run(test)


def test_tls_is_for_the_name_and_by_those_that_are_trusted(certificate: Path) -> None:
    async def test() -> None:
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.load_cert_chain(certificate)
        trusting = ssl.create_default_context(cafile=str(certificate))

        def poster(tls: ssl.SSLContext) -> Poster:
            return Poster(lambda _, port: [("127.0.0.1", port)], lambda _: True, tls, LONG)

        async with receiver(server) as hook:
            url = f"https://files.test:{hook.port}"
            await post(poster(trusting), url, url)
            for tls, name in ((trusting, "other.test"), (NO_ROOTS, "files.test")):
                url = f"https://{name}:{hook.port}"
                with pytest.raises(PostError, match="certificate"):
                    await post(poster(tls), url, url)
            assert len(hook.posts) == 1

    run(test)


def test_an_address_that_is_dead_is_passed_over() -> None:
    async def test() -> None:
        async with receiver() as hook:
            poster = Poster(
                lambda _, port: [("127.0.0.9", port), ("127.0.0.1", port)],
                is_public=lambda _: True,
                tls=NO_ROOTS,
                limits=LONG,
            )
            url = f"http://hooks.test:{hook.port}"
            await post(poster, url, url)
            assert len(hook.posts) == 1
            poster.close()

    run(test)


def test_a_name_that_takes_long_to_look_up_is_given_up() -> None:
    async def test() -> None:
        def slow(_: str, port: int) -> list[tuple[str, int]]:
            time.sleep(1)
            return [("127.0.0.1", port)]

        poster = Poster(slow, tls=NO_ROOTS, limits=SHORT)
        began = time.monotonic()
        with pytest.raises(PostError, match="longer than"):
            await post(poster, "hooks.test", "https://hooks.test/")
        assert time.monotonic() - began < 0.8
        poster.close()

    run(test)


async def sends_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n" + b"X: yyyyyy\r\n" * 2000)
    await reader.read()


async def announces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 103 Early\r\n\r\n" * 100)
    await reader.read()


async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200")


async def babbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")


async def redirects(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:1/\r\n\r\n")


@pytest.mark.parametrize(
    ("answering", "why"),
    [
        (sends_nothing, "longer than 0.3 s"),
        (drips, "longer than 0.3 s"),
        (floods, "longer than 16384 bytes"),
        (announces, "never began"),
        (closes, "broke off"),
        (babbles, "not answer as HTTP"),
        (redirects, "answered 307"),
    ],
)
def test_a_receiver_that_means_harm_costs_little(answering: Answering, why: str) -> None:
    async def test() -> None:
        async with receiver() as hook:
            hook.answering = answering
            poster = Poster(tls=NO_ROOTS, limits=SHORT if "longer than 0.3" in why else LONG)
            url = hook.origin
            with pytest.raises(PostError, match=why):
                await post(poster, url, url)
            poster.close()

    run(test)


def test_a_receiver_that_does_not_read_is_given_up() -> None:
    async def test() -> None:
        async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while not is_over:
                await asyncio.sleep(0.01)
            writer.close()

        is_over: list[bool] = []
        server = await asyncio.start_server(deaf, "127.0.0.1", 0, limit=1)
        poster = Poster(tls=NO_ROOTS, limits=SHORT)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(PostError, match="longer than"):
            await post(poster, url, url, bytes(50_000_000))
        is_over.append(True)
        await asyncio.sleep(0.05)
        server.close()
        poster.close()

    run(test)


def test_an_answer_that_goes_on_is_not_read(tmp_path: Path) -> None:
    async def test() -> None:
        async def long(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
            while True:
                writer.write(bytes(100_000))
                await writer.drain()

        async with receiver() as hook:
            hook.answering = long
            poster = Poster(tls=NO_ROOTS, limits=LONG)
            url = hook.origin
            await post(poster, url, url)
            poster.close()

    run(test)
