"""A stand-in for the Hugging Face hub on loopback, for the real client, that fails on demand."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote

Key = tuple[str, str]

_URL = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/?]+)\?blobs=(?i:true)"
)
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Request:
    """What a client asked for; range is the Range header, None without one."""

    method: str
    path: str
    range: str | None


@dataclass
class _Cut:
    offset: int
    times: int


def revision_of(repo: str) -> str:
    """The one commit that a repository of the stand-in has, 40 hexadecimal digits."""
    return hashlib.sha1(repo.encode()).hexdigest()


def url_path(repo: str, path: str) -> str:
    """The URL's path of a file at its repository's commit."""
    return f"/{repo}/resolve/{revision_of(repo)}/{path}"


class LocalHub:
    """Serves files by (repo, path) until it is left as a context manager.

    Attributes:
        requests: every request so far, in order.
    """

    def __init__(self, files: Mapping[Key, bytes]) -> None:
        self.requests: list[Request] = []
        self._files = dict(files)
        self._instead: dict[Key, bytes] = {}
        self._missing: set[Key] = set()
        self._cuts: dict[Key, _Cut] = {}
        self.redirects = False
        self.tokens: set[tuple[str, str | None]] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> LocalHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """What takes the place of https://huggingface.co."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def paths(self) -> set[str]:
        """The URL paths that were asked for."""
        return {request.path for request in self.requests}

    def gets(self, key: Key) -> list[Request]:
        """The GETs of one file, in order."""
        return [r for r in self.requests if r.method == "GET" and r.path == url_path(*key)]

    def cut(self, key: Key, offset: int, times: int) -> None:
        """Drop the connection where the file's byte offset would follow, for so many GETs."""
        self._cuts[key] = _Cut(offset, times)

    def flip_byte(self, key: Key) -> None:
        """Serve the file with its middle byte inverted."""
        body = bytearray(self._files[key])
        body[len(body) // 2] ^= 0xFF
        self._instead[key] = bytes(body)

    def serve_instead(self, key: Key, body: bytes) -> None:
        """Serve other bytes under the file's name and ETag."""
        self._instead[key] = body

    def remove(self, key: Key) -> None:
        """Answer 404 for the file."""
        self._missing.add(key)

    def redirect(self) -> None:
        """From now on send every GET to another host, as the hub does with large files."""
        self.redirects = True

    def repair(self) -> None:
        """Serve every file as it is."""
        self._instead.clear()
        self._missing.clear()
        self._cuts.clear()

    def body(self, key: Key) -> bytes | None:
        """The bytes to serve."""
        return None if key in self._missing else self._instead.get(key, self._files.get(key))

    def etag(self, key: Key) -> str:
        """The SHA-256 of the true file, as the hub has it for large files."""
        return hashlib.sha256(self._files[key]).hexdigest()

    def has_repo(self, repo: str) -> bool:
        """Whether there is such a repository."""
        return any(owner_name == repo for owner_name, _ in self._files)

    def listing(self, repo: str) -> dict[str, Any]:
        """A repository as the hub's API has it: all but JSON is kept as a large file."""
        siblings = [
            {
                "rfilename": path,
                "size": len(body),
                "lfs": None
                if path.endswith(".json")
                else {"sha256": self.etag((repo, path)), "size": len(body), "pointerSize": 130},
            }
            for (owner_name, path), body in self._files.items()
            if owner_name == repo
        ]
        card = {"license": "other", "license_name": "of-the-tests"}
        return {"id": repo, "sha": revision_of(repo), "siblings": siblings, "cardData": card}

    def take_cut(self, key: Key) -> int | None:
        """Where this GET of the file is cut, None where it is not."""
        cut = self._cuts.get(key)
        if cut is None or cut.times == 0:
            return None
        cut.times -= 1
        return cut.offset


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[LocalHub]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = unquote(self.path)
        host, _, port = self.headers["Host"].partition(":")
        self.hub.tokens.add((host, self.headers["Authorization"]))
        if self.hub.redirects and host == "127.0.0.1":
            return self._refuse(
                HTTPStatus.FOUND, {"Location": f"http://localhost:{port}{self.path}"}
            )
        self.hub.requests.append(Request(self.command, path, self.headers["Range"]))
        if (listed := _API.fullmatch(path)) and self.hub.has_repo(listed["repo"]):
            return self._list(listed["repo"])
        asked = _URL.fullmatch(path)
        if asked is None or not self.hub.has_repo(asked["repo"]):
            return self._refuse(HTTPStatus.UNAUTHORIZED, {"X-Error-Code": "RepoNotFound"})
        if asked["revision"] != revision_of(asked["repo"]):
            return self._refuse(HTTPStatus.NOT_FOUND, {"X-Error-Code": "RevisionNotFound"})
        key = (asked["repo"], asked["path"])
        body = self.hub.body(key)
        if body is None:
            return self._refuse(HTTPStatus.NOT_FOUND, {"X-Error-Code": "EntryNotFound"})
        return self._serve(key, body)

    def _refuse(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self._start(status, {**headers, "Content-Length": "0"})

    def _list(self, repo: str) -> None:
        """What the hub's API says of a repository at any revision, its licence among it."""
        body = json.dumps(self.hub.listing(repo)).encode()
        self._start(HTTPStatus.OK, {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def _serve(self, key: Key, body: bytes) -> None:
        ranged = _RANGE.fullmatch(self.headers["Range"] or "")
        start = int(ranged[1]) if ranged else 0
        if ranged and ranged[2]:
            body = body[: int(ranged[2]) + 1]
        if ranged and start >= len(body):
            unsatisfiable = {"Content-Range": f"bytes */{len(body)}"}
            return self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, unsatisfiable)
        headers = {
            "Content-Length": str(len(body) - start),
            "Accept-Ranges": "bytes",
            "ETag": f'"{self.hub.etag(key)}"',
            "X-Repo-Commit": revision_of(key[0]),
        }
        if ranged:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._start(HTTPStatus.PARTIAL_CONTENT if ranged else HTTPStatus.OK, headers)
        if self.command == "GET":
            self._send(body, start, self.hub.take_cut(key))
        return None

    def _start(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, body: bytes, start: int, cut: int | None) -> None:
        self.wfile.write(body[start:cut])
        if cut is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
