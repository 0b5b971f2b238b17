"""One POST to a receiver, that costs little time and memory whatever the receiver does."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from deploy.gateway.hooks.webhook_hosts import Receiver
from dmd2.loras.public_fetch import is_public, resolve, trusted_roots
from dmd2.loras.wire import Address

MAX_HEAD_BYTES = 16_384
_MAX_INTERIM = 4
_NUM_RESOLVERS = 4
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ \r\n]")


@dataclass(frozen=True)
class PostLimits:
    """What one POST may take.

    Attributes:
        connect_s: until the connection stands, TLS included, for each address.
        total_s: until the answer's head is read, looking up the host included.
    """

    connect_s: float = 5.0
    total_s: float = 20.0


class PostError(Exception):
    """Nobody took it; the message says why, and holds no path, query or header."""


class Poster:
    """Sends POSTs. Its parameters are for tests, and production takes the defaults.

    Args:
        resolve: the addresses of a host and a port.
        is_public: whether an address may be connected to.
        tls: the certificates that are trusted.
        limits: of each POST.
    """

    def __init__(
        self,
        resolve: Callable[[str, int], list[Address]] = resolve,
        is_public: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
        limits: PostLimits | None = None,
    ) -> None:
        self._resolve, self._is_public = resolve, is_public
        self._tls, self._limits = tls or trusted_roots(), limits or PostLimits()
        # Of its own: a name that takes long to look up must not take the loop's other threads.
        self._resolvers = ThreadPoolExecutor(_NUM_RESOLVERS, thread_name_prefix="dmd2-resolve")

    async def post(self, receiver: Receiver, headers: Mapping[str, str], body: bytes) -> None:
        """Send it once.

        The host is resolved once, all its addresses must be public unless the receiver may be
        inside, and it is connected to at one of them. No redirect is followed, and of the answer no
        more than its head is read.

        Raises:
            PostError: it could not be sent, or the answer's status is not 2xx.
        """
        try:
            async with asyncio.timeout(self._limits.total_s):
                status = await self._status(receiver, _request(receiver, headers, body))
        except TimeoutError:
            raise PostError(f"it took longer than {self._limits.total_s:g} s") from None
        except (OSError, ValueError) as error:
            raise PostError(_kind_of(error)) from None
        if not 200 <= status < 300:
            raise PostError(f"it answered {status}")

    def close(self) -> None:
        """End its threads; a look-up that still runs is left behind."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def _status(self, receiver: Receiver, request: list[bytes]) -> int:
        reader, writer = await self._connect(receiver)
        try:
            writer.writelines(request)
            await writer.drain()
            return await _answered(reader)
        finally:
            writer.transport.abort()

    async def _connect(
        self, receiver: Receiver
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        host, port = receiver.host, receiver.port
        found = await loop.run_in_executor(self._resolvers, self._resolve, host, port)
        is_allowed = receiver.may_be_inside or all(self._is_public(ip) for ip, _ in found)
        if not found or not is_allowed:
            raise PostError("its host is not at public addresses of the internet")
        is_tls = receiver.scheme == "https"
        failed: Exception = OSError()
        for address, _ in found:
            try:
                async with asyncio.timeout(self._limits.connect_s):
                    return await asyncio.open_connection(
                        address,
                        port,
                        ssl=self._tls if is_tls else None,
                        server_hostname=host if is_tls else None,
                        limit=MAX_HEAD_BYTES,
                        family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                    )
            except (OSError, ValueError, TimeoutError) as error:
                failed = error
        raise PostError(f"it could not be connected to ({_kind_of(failed)})")


def _request(receiver: Receiver, headers: Mapping[str, str], body: bytes) -> list[bytes]:
    said = {
        "Host": receiver.authority,
        "User-Agent": "dmd2-gateway",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    lines = [
        f"POST {receiver.target} HTTP/1.1",
        *(f"{name}: {text}" for name, text in said.items()),
    ]
    assert all(line.isascii() and line.isprintable() for line in lines), "a header was forged"
    return ["\r\n".join([*lines, "", ""]).encode(), body]


async def _answered(reader: asyncio.StreamReader) -> int:
    """The status of the answer, past those that only announce it."""
    for _ in range(_MAX_INTERIM):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise PostError(f"its answer's head is longer than {MAX_HEAD_BYTES} bytes") from None
        except asyncio.IncompleteReadError:
            raise PostError("it broke off") from None
        if (found := _STATUS.match(head)) is None:
            raise PostError("it does not answer as HTTP asks for")
        if (status := int(found[1])) >= 200:
            return status
    raise PostError("its answer never began")


def _kind_of(error: Exception) -> str:
    """What went wrong, without whatever a library puts into its messages of hosts and URLs."""
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate: {error.verify_message}"
    said = error.strerror if isinstance(error, OSError) else None
    return ascii(said or type(error).__name__)[1:-1]
