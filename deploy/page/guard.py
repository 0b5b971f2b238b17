"""Who may talk to the page, and whom its HTML may talk to: this machine alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HOSTS = ("127.0.0.1", "localhost", "::1")
# Gradio needs inline scripts and eval; nothing needs another host.
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
]


class Guard:
    """An ASGI app behind two rules.

    A request is refused unless it names this machine as its host, since a page elsewhere can have
    its own name resolve to 127.0.0.1; and unless the site that sends it, where the browser says
    which, is the page itself. Each answer tells the browser to load nothing from elsewhere.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page has no use for web sockets
            await send({"type": "websocket.close"})
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not is_allowed(headers.get(b"host", ""), headers.get(b"origin")):
            start = {"type": "http.response.start", "status": 403}
            await send(start | {"headers": [(b"content-type", b"text/plain")]})
            body = b"The page answers to 127.0.0.1 and localhost alone, and to its own requests.\n"
            await send({"type": "http.response.body", "body": body})
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        await self.app(scope, receive, send_guarded)


def is_allowed(host: str, origin: str | None) -> bool:
    """Whether a request's headers say that it was sent to this machine, by the page itself."""
    try:
        if urlsplit(f"//{host}").hostname not in HOSTS:
            return False
        return origin is None or urlsplit(origin).netloc == host
    except ValueError:
        return False
