"""GET over https from hosts that anybody could reach, whatever a URL or a redirect says.

On http.client and ssl alone: what is decided here is which address a socket is connected to and
when a read may give up, and a larger client would have both underneath it.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import TypeVar, cast
from urllib.parse import quote, urljoin, urlsplit

import certifi

from dmd2.errors import LoraError
from dmd2.loras.wire import Address, Limits, Patience, Wire

Result = TypeVar("Result")

MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 20
_FIRST_BYTES = 512  # soon there, and enough to tell what comes
_PORT = 443
_HEADERS = {
    "User-Agent": "dmd2-cog",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
}
# All that may stand in a path or a query as it is; "%" because it is quoted already.
_URL_CHARS = "%/:?@!$&'()*+,;=~[]"
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64, _UNICAST = IPv6Network("64:ff9b::/96"), IPv6Network("2000::/3")
_AGAIN = "Try again, or use another source"
_OTHER_SOURCE = "Use another source"


def resolve(host: str, port: int) -> list[Address]:
    """The addresses of a host, as the system has them."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((str(each[4][0]), port) for each in found))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, for one host alone.

    An IPv4 address within an IPv6 one (mapped, 6to4, NAT64) counts as itself; Teredo is not public.
    """
    ip = ip_address(address)
    if isinstance(ip, IPv4Address):
        return ip.is_global and not ip.is_multicast and not ip.is_reserved
    within = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour
    return is_public(str(within)) if within is not None else ip in _UNICAST and ip.is_global


def trusted_roots() -> ssl.SSLContext:
    """A context that trusts the system's certificates and certifi's."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


class PublicFetch:
    """A client; its parameters are for tests, and production takes the defaults.

    Args:
        resolve: the addresses of a host and a port.
        is_public: whether an address may be connected to.
        tls: the certificates that are trusted.
        limits: of each GET.
    """

    def __init__(
        self,
        resolve: Callable[[str, int], list[Address]] = resolve,
        is_public: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._resolve, self._is_public = resolve, is_public
        self._tls, self._limits = tls or trusted_roots(), limits or Limits()

    def get(
        self,
        url: str,
        *,
        max_bytes: int,
        cancelled: threading.Event,
        token: str | None = None,
        etag: str = "",
    ) -> Answer:
        """The answer to a GET, of any status but a redirect's, with its body yet to be read.

        Every host is resolved once, must have public addresses only, and is connected to at one of
        them; so is that of every redirect. The token goes to the URL's own host alone; with an etag
        the status may be 304.

        Raises:
            LoraError: it cannot be had, or may not. No message holds a path, a query or a token.
            CancelledError: soon after cancelled was set.
        """
        patience = Patience(cancelled, self._limits)
        first_host, _ = _host_and_target(url)
        for _ in range(1 + MAX_REDIRECTS):
            host, target = _host_and_target(url)
            token = token if host == first_host else None  # once away, it does not come back
            headers = dict(_HEADERS, Host=host)
            if token is not None:
                headers["Authorization"] = f"Bearer {token}"
            if etag:
                headers["If-None-Match"] = etag
            answer = Answer(host, self._connect(host, patience), max_bytes)
            try:
                answer.ask(target, headers)
                if answer.status not in _REDIRECTS:
                    return answer
                url = _plainly(host, partial(urljoin, url, answer.header("Location")))
            except BaseException:
                answer.close()
                raise
            answer.close()
        raise LoraError(f"{first_host} redirects more than {MAX_REDIRECTS} times", _OTHER_SOURCE)

    def _connect(self, host: str, patience: Patience) -> Wire:
        addresses = _plainly(host, partial(self._resolve, host, _PORT))
        if not addresses or not all(self._is_public(ip) for ip, _ in addresses):
            raise LoraError(f"{host} is not at public addresses of the internet", _OTHER_SOURCE)
        for address in addresses:
            wire = Wire(address, patience)
            try:
                wire.connect(self._tls, host)
                return wire
            except (OSError, ValueError) as error:
                wire.end()
                failed = _kind_of(error)
            except BaseException:
                wire.end()
                raise
        raise LoraError(f"{host} could not be connected to ({failed})", _AGAIN)


class Answer:
    """One answer; a context manager that ends its connection.

    Attributes:
        host: that gave it.
        status: of HTTP.
    """

    def __init__(self, host: str, wire: Wire, max_bytes: int) -> None:
        self.host, self._wire, self._max_bytes = host, wire, max_bytes
        # It asks a socket for nothing but makefile.
        self._response = http.client.HTTPResponse(cast(socket.socket, wire), method="GET")

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._wire.end()

    def ask(self, target: str, headers: Mapping[str, str]) -> None:
        """Send the request, and read the answer's head."""
        lines = [f"GET {target} HTTP/1.1", *(f"{name}: {text}" for name, text in headers.items())]
        assert all(line.isascii() and line.isprintable() for line in lines), "a header was forged"
        head = "\r\n".join([*lines, "", ""]).encode()
        _plainly(self.host, partial(self._wire.send, head))
        _plainly(self.host, self._response.begin)
        self.status = self._response.status

    def header(self, name: str) -> str:
        """A header's value; empty where there is none."""
        return self._response.getheader(name, "")

    @property
    def num_bytes(self) -> int | None:
        """Of the body, as declared, until it is read; None where nothing is."""
        return self._response.length

    @property
    def etag(self) -> str:
        """What the same URL can be asked with later; empty where there is none."""
        etag = self.header("ETag")
        return etag if re.fullmatch(r'(W/)?"[\x21\x23-\x7e]{1,200}"', etag) else ""

    def chunks(self) -> Iterator[bytes]:
        """The body, which must be as long as was declared and at most max_bytes.

        The first chunk has 512 bytes, unless the whole body has fewer.

        Raises:
            LoraError: it is not, or cannot be read.
        """
        declared, received = self.num_bytes, 0
        if self.header("Content-Encoding") not in ("", "identity"):
            raise LoraError(f"{self.host} compresses what it sends, unasked", _OTHER_SOURCE)
        self._check_size(declared or 0)
        size = _FIRST_BYTES
        while chunk := _plainly(self.host, partial(self._response.read, size)):
            received, size = received + len(chunk), CHUNK_BYTES
            self._check_size(received)
            yield chunk
        if declared not in (None, received):
            raise LoraError(f"{self.host} broke off at {received} of {declared} bytes", _AGAIN)
        if self._wire.goes_on():
            raise LoraError(f"{self.host} sends more bytes than it declared", _OTHER_SOURCE)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise LoraError(
                f"{self.host} sends more than {self._max_bytes} bytes", "Use a smaller file"
            )


def _host_and_target(url: str) -> tuple[str, str]:
    """The host and the rest of a URL that may be fetched."""
    try:
        parts = urlsplit(url)
        is_plain = parts.username is None and parts.port in (None, _PORT)
    except ValueError:
        raise LoraError("it leads to what is no URL", _OTHER_SOURCE) from None
    host = parts.hostname or ""
    if parts.scheme != "https" or not is_plain or not re.fullmatch(r"[a-z0-9._-]+", host):
        raise LoraError(
            f"it leads to a URL that is not https, with a host's plain name, on port {_PORT}",
            _OTHER_SOURCE,
        )
    query = f"?{quote(parts.query, safe=_URL_CHARS)}" if parts.query else ""
    return host, quote(parts.path or "/", safe=_URL_CHARS) + query


def _plainly(host: str, call: Callable[[], Result]) -> Result:
    """What a call gives; its errors without the URLs that http.client puts into them."""
    try:
        return call()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise LoraError(f"{host} could not be read ({_kind_of(error)})", _AGAIN) from None


def _kind_of(error: Exception) -> str:
    text = error.strerror or str(error) if isinstance(error, OSError) else type(error).__name__
    return ascii(text)[1:-1]
