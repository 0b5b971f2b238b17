"""A gateway on its port, and its orderly end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from asyncio import FIRST_COMPLETED
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from deploy.gateway.settings import GatewaySettings
from dmd2.errors import DMD2Error

log = logging.getLogger(__name__)

# Longer than the clients' own pools keep a connection, or one is closed as a request comes.
_KEEP_ALIVE_S = 75
# What Cog's server takes of headers, which uvicorn's 16 kB is not.
_MAX_HEADER_BYTES = 256_000
_BACKLOG = 2048
# At the end, for who reads its answer slowly; with no answer left to come.
_LAST_ANSWERS_S = 30


def check_host(host: str, settings: GatewaySettings) -> None:
    """Refuse to be open to others than this machine without a token.

    Raises:
        DMD2Error: it would be.
    """
    if not settings.api_token and not _is_loopback(host):
        raise DMD2Error(
            f"--host {host} is open to other machines, and DMD2_API_TOKEN is not set: whoever "
            "reaches the port could use the gateway. Set it to a long random text that every "
            "client sends as a Bearer token, or listen on 127.0.0.1"
        )


def listening(host: str, port: int, settings: GatewaySettings) -> socket.socket:
    """The gateway's socket, taken before anything slow begins.

    Raises:
        DMD2Error: it cannot be had, or would be open to others than this machine without a token.
    """
    check_host(host, settings)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        taken.close()
        raise DMD2Error(
            f"port {port} of {host} cannot be listened on ({error}). Choose another: PORT=5001"
        ) from error
    return taken


async def serve(app: Starlette, listener: socket.socket, stop: asyncio.Event) -> None:
    """Answer requests until stop is set, and then until all that was accepted is answered.

    Raises:
        DMD2Error: the gateway cannot begin, or no engine can be opened.
    """
    async with app.router.lifespan_context(app):
        server = _Server(uvicorn_config(app))
        answering = asyncio.create_task(server.serve(sockets=[listener]))
        stopping = asyncio.create_task(stop.wait())
        following: asyncio.Task[None] = app.state.following
        try:
            await asyncio.wait({answering, following, stopping}, return_when=FIRST_COMPLETED)
            if following.done():
                following.result()  # raises
            log.info("ending: new requests are refused, those that were accepted are answered")
            await app.state.predictions.drain()
        finally:
            stopping.cancel()
            server.should_exit = True
            await answering


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it: they must not close the port before what runs is over."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    """How a gateway's app is served, wherever that is; its lifespan is the caller's affair."""
    return uvicorn.Config(
        app,
        http="h11",  # as strict as Cog's server, and there in every environment
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        backlog=_BACKLOG,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
