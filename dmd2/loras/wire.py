"""A TLS connection to one address that never waits in vain: cancelled, timed out or silent."""

from __future__ import annotations

import errno
import io
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

Address = tuple[str, int]
Result = TypeVar("Result")

_LOOK_UP_MS = 100
# How long after a body the other side may take to end the connection.
_END_S = 1.0


@dataclass(frozen=True)
class Limits:
    """What one GET may take.

    Attributes:
        connect_s: for each address, until TLS stands.
        stall_s: that the other side may be silent.
        total_s: for everything, redirects included.
    """

    connect_s: float = 10.0
    stall_s: float = 30.0
    total_s: float = 900.0


class Patience:
    """How long a GET may go on; every wait of it is here."""

    def __init__(self, cancelled: threading.Event, limits: Limits) -> None:
        self.limits = limits
        self._cancelled, self._ends = cancelled, time.monotonic() + limits.total_s

    def check(self) -> None:
        """Raise if nobody waits for it any more, or it took too long."""
        if self._cancelled.is_set():
            raise CancelledError
        if time.monotonic() > self._ends:
            raise TimeoutError(f"not done within {self.limits.total_s:g} s")

    def wait(self, sock: socket.socket, event: int, until: float) -> None:
        """Wait for a socket, until a time of the monotonic clock."""
        poll = select.poll()
        poll.register(sock, event)
        while not poll.poll(_LOOK_UP_MS):
            self.check()
            if time.monotonic() > until:
                raise TimeoutError("it was silent too long")


class Wire(io.RawIOBase):
    """A TLS connection to one address, never blocking for longer than its patience."""

    def __init__(self, address: Address, patience: Patience) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        self._address, self._patience = address, patience
        self._silence_s = patience.limits.stall_s
        self._reader = _Reader(self)

    def connect(self, tls: ssl.SSLContext, host: str) -> None:
        """Connect, and check the certificate for the host's name."""
        until = time.monotonic() + self._patience.limits.connect_s
        code = self._sock.connect_ex(self._address)
        if code == errno.EINPROGRESS:
            self._patience.wait(self._sock, select.POLLOUT, until)
            code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self._sock = tls.wrap_socket(
            self._sock, server_hostname=host, do_handshake_on_connect=False
        )
        self._when_ready(self._sock.do_handshake, until)

    def send(self, data: bytes) -> None:
        """Send all of it."""
        while data:
            data = data[self._when_ready(partial(self._sock.send, data)) :]

    def makefile(self, _: str) -> io.BufferedReader:
        """What http.client reads from."""
        return self._reader

    def readable(self) -> bool:
        """As io asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As io asks; 0 at the end."""
        return self._when_ready(lambda: self._sock.recv_into(buffer))

    def goes_on(self) -> bool:
        """Whether anything follows what was read, before the other side ends the connection."""
        self._silence_s = _END_S
        with suppress(OSError):
            return bool(self._reader.read1(1))
        return False

    def end(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _when_ready(self, call: Callable[[], Result], until: float | None = None) -> Result:
        until = time.monotonic() + self._silence_s if until is None else until
        while True:
            self._patience.check()
            try:
                return call()
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            self._patience.wait(self._sock, event, until)


class _Reader(io.BufferedReader):
    """Stays open when http.client has read a body, to be asked for what follows."""

    def close(self) -> None:
        """Leave it open: the wire is ended on its own."""
