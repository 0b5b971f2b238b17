"""A server that speaks Cog's HTTP and draws nothing: it answers as a test says."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def data_url(content: bytes = PNG, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def succeeded(*outputs: str, **metrics: Any) -> tuple[int, dict[str, Any]]:
    return 200, {"status": "succeeded", "output": list(outputs), "logs": "", "metrics": metrics}


def schema(required: tuple[str, ...] = ("prompt",), **properties: Any) -> dict[str, Any]:
    """A description of inputs."""
    inputs = {"properties": properties, "required": list(required)}
    return {"components": {"schemas": {"Input": inputs}}}


@dataclass
class FakeServer:
    """What it answers, and what it was asked.

    Attributes:
        answers: to PUT, one after another; the last one for ever. For None, and without any, it
            holds the request until it is cancelled, and answers that it was.
        health: the status that it says of itself.
        openapi: the description of its inputs.
        requests: every one, as method, path, body and headers.
        cancelled, left: whether a request that it held was cancelled by id; or its client left.
    """

    url: str = ""
    answers: list[tuple[int, Any] | None] = field(default_factory=list)
    health: str = "READY"
    openapi: dict[str, Any] = field(default_factory=lambda: schema(prompt={"type": "string"}))
    requests: list[tuple[str, str, Any, dict[str, str]]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    reply_headers: dict[str, str] = field(default_factory=dict)

    def asked(self, method: str) -> list[Any]:
        """The bodies of all requests of a method."""
        return [body for verb, _, body, _ in self.requests if verb == method]


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """One on a free port."""
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            fake.requests.append((self.command, self.path, body, dict(self.headers)))
            code, answer = self._decide()
            if answer is None:
                return
            content = json.dumps(answer).encode() if not isinstance(answer, bytes) else answer
            self.send_response(code)
            for name, value in fake.reply_headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = _answer

        def _decide(self) -> tuple[int, Any]:
            if self.path == "/health-check":
                logs = "loaded sdxl-4step on cuda as torch.float16 in 1 s"
                return 200, {"status": fake.health, "setup": {"logs": logs}}
            if self.path == "/openapi.json":
                return 200, fake.openapi
            if self.path.endswith("/cancel"):
                fake.cancelled.set()
                return 200, {}
            answer = fake.answers.pop(0) if len(fake.answers) > 1 else (*fake.answers, None)[0]
            if answer is not None:
                return answer
            return 200, {"status": "canceled"} if self._is_cancelled() else None

        def _is_cancelled(self) -> bool:
            """Wait for one end or the other."""
            while not fake.cancelled.wait(0.05):
                with suppress(BlockingIOError):
                    if not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                        fake.left.set()
                        return False
            return True

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield fake
    finally:
        fake.cancelled.set()
        http.shutdown()
        http.server_close()
