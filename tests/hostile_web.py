"""An internet on loopback: hosts with TLS that answer as a test tells them."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from dmd2.loras.fetching import LoraFetcher
from dmd2.loras.public_fetch import PublicFetch
from dmd2.loras.wire import Address, Limits
from dmd2.settings import LORA_SOURCES, Settings

OUTSIDE, INSIDE, DEAD = "127.0.0.1", "127.0.0.2", "127.0.0.3"
HOSTS = ("huggingface.co", "civitai.com", "civitai.red", "cdn.test", "files.test", "inside.test")
# For a busy machine, where nothing is to be waited for; and for tests of what is.
LIMITS = Limits(connect_s=10.0, stall_s=10.0, total_s=30.0)
SHORT = Limits(connect_s=0.5, stall_s=0.5, total_s=5.0)


@dataclass(frozen=True)
class Reply:
    """What a host answers; length is what it declares, None for nothing, "true" for the truth."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | str | None = "true"
    # Called after the body; what it sends goes on.
    then: Callable[[BaseHTTPRequestHandler], None] | None = None


Answering = Reply | Callable[[BaseHTTPRequestHandler], Reply]


@dataclass(frozen=True)
class Seen:
    """A request that arrived."""

    host: str
    path: str
    headers: Mapping[str, str]
    address: str


def lora(seed: int = 0, num_bytes: int = 4000) -> bytes:
    """A safetensors file; another one for each seed."""
    tensor = np.random.default_rng(seed).standard_normal(num_bytes // 4, np.float32)
    return save({"lora_unet_x.lora_down.weight": tensor})


def redirect(to: str, status: int = 302) -> Reply:
    return Reply(status=status, headers={"Location": to})


def as_json(value: Any) -> Reply:
    return Reply(json.dumps(value).encode(), headers={"Content-Type": "application/json"})


def forever(send: Callable[[BaseHTTPRequestHandler], None]) -> Callable[..., None]:
    """Does something until the client has gone, for at most ten seconds."""

    def then(handler: BaseHTTPRequestHandler) -> None:
        until = time.monotonic() + 10
        with suppress(OSError):
            while time.monotonic() < until:
                send(handler)

    return then


@forever
def more_bytes(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(bytes(100_000))


def silence(handler: BaseHTTPRequestHandler) -> None:
    """Until the client has gone."""
    handler.connection.settimeout(10)
    with suppress(OSError):
        handler.connection.recv(1)


class HostileWeb:
    """Serves (host, path) until it is closed, at one public address and one that is not.

    Attributes:
        answers: by host and path without query.
        addresses: of hosts that are not at the public address, for one resolution after another;
            the last one stays.
        seen: every request so far.
        resolved: every host that was looked up.
        tls: trusts the certificate.
    """

    def __init__(self, certificate: Path) -> None:
        self.answers: dict[tuple[str, str], Answering] = {}
        self.addresses: dict[str, list[list[str]]] = {"inside.test": [[INSIDE]]}
        self.seen: list[Seen] = []
        self.resolved: list[str] = []
        self._servers = [self._serve(address, certificate) for address in (OUTSIDE, INSIDE)]
        self.tls = ssl.create_default_context(cafile=str(certificate))

    def client(self, limits: Limits = LIMITS) -> PublicFetch:
        """Finds this internet, and takes the public address, and one that is dead, for public."""
        return PublicFetch(self.resolve, lambda ip: ip in (OUTSIDE, DEAD), self.tls, limits)

    def fetcher(self, folder: Path, max_bytes: int = 1_000_000, **settings: Any) -> LoraFetcher:
        """With a cache in a folder, and every source allowed."""
        (folder / "own").mkdir(parents=True, exist_ok=True)
        asked = {
            "lora_sources": LORA_SOURCES,
            "lora_dir": folder / "own",
            "lora_cache_dir": folder / "cache",
            **settings,
        }
        return LoraFetcher(Settings("m", **asked), self.client(), max_bytes)

    def paths(self, host: str) -> list[str]:
        """What was asked of a host."""
        return [seen.path for seen in self.seen if seen.host == host]

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def resolve(self, host: str, port: int) -> list[Address]:
        assert port == 443
        self.resolved.append(host)
        answers = self.addresses.get(host, [[OUTSIDE]])
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        ports = {server.server_address[0]: server.server_port for server in self._servers}
        return [(ip, ports.get(ip, 443)) for ip in found]

    def _serve(self, address: str, certificate: Path) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"web": self})
        server = _Server((address, 0), handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    web: HostileWeb
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        host, path = self.headers["Host"], self.path.partition("?")[0]
        address = self.server.server_address[0]
        self.web.seen.append(Seen(host, self.path, dict(self.headers), str(address)))
        answering = self.web.answers.get((host, path), Reply(status=404))
        reply = answering if isinstance(answering, Reply) else answering(self)
        self.close_connection = True
        self.send_response(reply.status)
        length = len(reply.body) if reply.length == "true" else reply.length
        for name, text in {"Content-Length": length, **reply.headers}.items():
            if text is not None:
                self.send_header(name, str(text))
        self.end_headers()
        self.wfile.write(reply.body)
        if reply.then is not None:
            reply.then(self)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of every host, which is its own authority."""
    folder = tmp_path_factory.mktemp("tls")
    names = ",".join(f"DNS:{host}" for host in HOSTS)
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x "
        f"-addext subjectAltName={names} -keyout key -out certificate"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    path = folder / "both"
    path.write_bytes((folder / "certificate").read_bytes() + (folder / "key").read_bytes())
    return path


@pytest.fixture
def web(certificate: Path) -> Iterator[HostileWeb]:
    web = HostileWeb(certificate)
    yield web
    web.close()


def has_secret(text: str) -> bool:
    """Whether a text holds one of the tests' secrets, which all have this word in them."""
    return re.search("secret", text, re.IGNORECASE) is not None
