"""A receiver of webhooks, as a user of the client would have one."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer


class Hook:
    """Keeps what it receives: headers and body of each message."""

    def __init__(self, port: int) -> None:
        self.received: list[tuple[dict[str, str], bytes]] = []
        self._has_one = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.received.append((dict(self.headers), body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()
                hook._has_one.set()

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{port}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def first(self) -> tuple[dict[str, str], bytes]:
        """The first message."""
        assert self._has_one.wait(30), "no webhook came"
        return self.received[0]

    def close(self) -> None:
        self._server.shutdown()
