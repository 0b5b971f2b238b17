"""Which URLs may be told of a prediction: those of the hosts that the operator lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from deploy.gateway.prediction import EVENTS, Event, Webhook
from dmd2.errors import DMD2Error, InvalidRequestError

MAX_URL_CHARS = 2000
_PORTS = {"https": 443, "http": 80}
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,251}[a-z0-9])?")
# All that a URL is written with; its own escapes are "%".
_URL = re.compile(r"[!#-;=?-\[\]_a-z~]+", re.IGNORECASE)


@dataclass(frozen=True)
class Receiver:
    """Where a webhook's URL leads.

    Attributes:
        scheme: "https", or "http" where the operator listed that.
        host: a name or an IP address, in lower case.
        port: of it.
        target: path and query, as a request's first line has them.
    """

    scheme: str
    host: str
    port: int
    target: str = "/"

    @property
    def origin(self) -> tuple[str, str, int]:
        """What the operator lists."""
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def may_be_inside(self) -> bool:
        """Whether it need not be on the internet: it is named by its address, or as this machine.

        Somebody who lists an address knows where it is. Where a name leads, its owner decides.
        """
        return self.host == "localhost" or is_address(self.host)


class WebhookHosts:
    """The origins that may be told.

    Args:
        listed: of DMD2_WEBHOOK_HOSTS, each a host, with https:// or http:// before it or neither,
            which means https, and with :port behind it or not. An entry allows its own scheme and
            port alone.

    Raises:
        DMD2Error: an entry is none of that.
    """

    def __init__(self, listed: Iterable[str]) -> None:
        self._origins = {_listed_origin(entry) for entry in listed}

    @property
    def origins(self) -> frozenset[tuple[str, str, int]]:
        """All that may be told."""
        return frozenset(self._origins)

    def asked(self, body: Mapping[str, Any], default: tuple[Event, ...]) -> Webhook | None:
        """Who is to be told, going by `webhook` and `webhook_events_filter` of a request's body.

        Args:
            body: of the request.
            default: the events of a body that names none.

        Raises:
            InvalidRequestError: the URL may not be told, or an event is none.
        """
        url, events = body.get("webhook"), body.get("webhook_events_filter")
        if url is None:
            return None
        self.receiver(url)
        if events is None:
            return Webhook(url, default)
        if not isinstance(events, list) or not all(event in EVENTS for event in events):
            raise InvalidRequestError(
                "webhook_events_filter",
                events,
                f"it must be a list of {', '.join(EVENTS)}",
                "Name some of those, or leave it out",
            )
        return Webhook(url, tuple(event for event in EVENTS if event in events))

    def receiver(self, url: object) -> Receiver:
        """Where the URL of a webhook leads, if it may be told.

        Raises:
            InvalidRequestError: it may not. The message holds neither path nor query.
        """
        receiver = _parsed(url)
        if not self._origins:
            raise _refused(
                receiver.authority,
                "this gateway sends no webhooks",
                "Ask for the prediction instead, or have the operator list the host in "
                "DMD2_WEBHOOK_HOSTS",
            )
        if receiver.origin not in self._origins:
            raise _refused(
                f"{receiver.scheme}://{receiver.authority}",
                "this gateway sends webhooks to the hosts of DMD2_WEBHOOK_HOSTS alone, with the "
                "scheme and port that are listed",
                "Use one of those, or have the operator list it",
            )
        return receiver


def is_address(host: str) -> bool:
    """Whether a host is an IP address, and no name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _parsed(url: object) -> Receiver:
    if not isinstance(url, str):
        raise _refused(type(url).__name__, "it must be a URL, as text", "Send a string")
    if len(url) > MAX_URL_CHARS or not _URL.fullmatch(url):
        raise _refused(
            f"a text of {len(url)} characters",
            f"it must be a URL of at most {MAX_URL_CHARS} characters, with all others escaped",
            "Escape or shorten it",
        )
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        scheme = host = ""
    if scheme not in _PORTS or not (_NAME.fullmatch(host) or is_address(host)):
        raise _refused("a text", "it must be a URL with https:// and a host", "Send one")
    if parts.username is not None or parts.password is not None:
        raise _refused(host, "it may hold no user and no password", "Leave them out")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Receiver(scheme, host, _PORTS[scheme] if port is None else port, target)


def _refused(value: str, limit: str, remedy: str) -> InvalidRequestError:
    return InvalidRequestError("webhook", value, limit, remedy)


def _listed_origin(entry: str) -> tuple[str, str, int]:
    url = entry if "://" in entry else f"https://{entry}"
    try:
        receiver = _parsed(url)
    except InvalidRequestError:
        receiver = None
    if receiver is None or receiver.target != "/" or receiver.port == 0:
        raise DMD2Error(
            f"DMD2_WEBHOOK_HOSTS: {entry!r} is no host; write hooks.example.com, "
            "hooks.example.com:8443, or http://127.0.0.1:9000 where https is not wanted"
        )
    return receiver.origin
