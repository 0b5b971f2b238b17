"""Fetched LoRAs on disk, by their content; threads and processes may share the folder.

`<sha256>.safetensors` is a file that is complete, and locked, shared, by whoever uses it.
`<key's hash>.part` is one on its way, and locked by whoever fetches it, so that nobody else does.
`index.json` says which content a reference had; it holds hashes of references, never their text.
Locks are flock's: they end with the process. A file's modification time is that of its last use.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dmd2.errors import DMD2Error, LoraError
from dmd2.loras.sources import SUFFIX

log = logging.getLogger(__name__)

_MAX_ENTRIES = 2000
_POLL_S = 0.05
_PART = ".part"


@dataclass(frozen=True)
class Entry:
    """What a reference had when it was last fetched.

    Attributes:
        sha256: of the content.
        etag: of the answer; empty where it had none.
        is_private: whether it was had with a token.
    """

    sha256: str
    etag: str
    is_private: bool


class LoraCache:
    """A folder of files.

    Args:
        folder: is made where it is missing.
        max_bytes: of all files together; at most half of what the disk has free for them now, since
            images may lie on the same one.

    Raises:
        DMD2Error: the folder cannot be used, or is somebody else's.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._verified: set[tuple[str, int, int]] = set()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner, free = folder.stat().st_uid, shutil.disk_usage(folder).free
            half = (free + sum(size for _, size, _ in self._files())) // 2
        except OSError as error:
            raise DMD2Error(f"DMD2_LORA_CACHE_DIR={folder}: {error.strerror}") from error
        if owner not in (0, os.geteuid()):
            raise DMD2Error(f"DMD2_LORA_CACHE_DIR={folder} belongs to another user")
        self.max_bytes = min(max_bytes, half)
        if half < max_bytes:
            log.warning("fetched LoRAs may take %d bytes, half of what %s has free", half, folder)

    def find(self, key: str, sha256: str | None) -> tuple[Entry, BinaryIO] | None:
        """What a reference had, and that file, if it is still there; sha256 if it must have that.

        The file stays where it is as long as it is open.
        """
        with suppress(KeyError, TypeError):
            entry = Entry(**self._index()[_hash_of(key)])
            if sha256 in (None, entry.sha256) and (file := self._open(entry.sha256)) is not None:
                return entry, file
        return None

    def remember(self, key: str, entry: Entry) -> None:
        """Note what a reference has now."""
        with self._locked():
            index = self._index()
            index.pop(_hash_of(key), None)
            index[_hash_of(key)] = asdict(entry)
            new = self.folder / "index.new"
            new.write_text(json.dumps(dict(list(index.items())[-_MAX_ENTRIES:])))
            new.replace(self.folder / "index.json")

    @contextmanager
    def claim(self, key: str, cancelled: threading.Event) -> Iterator[BinaryIO]:
        """An empty file to fetch a reference into; nobody else has one for it at the same time.

        Raises:
            CancelledError: cancelled was set while somebody else had it.
        """
        path = self.folder / f"{_hash_of(key)}{_PART}"
        while True:
            part = path.open("a+b")
            is_mine = _lock(part)
            if is_mine and _is_at(part, path):
                break
            part.close()
            if not is_mine and cancelled.wait(_POLL_S):
                raise CancelledError
        try:
            part.truncate(0)
            yield part
        finally:
            if _is_at(part, path):
                path.unlink()
            part.close()

    def write(self, part: BinaryIO, chunks: Iterable[bytes]) -> str:
        """Write a claimed file; the sha256 of its content.

        Raises:
            LoraError: there is no room, and what takes it is in use.
            OSError: the disk is full, or cannot be written.
        """
        digest = hashlib.sha256()
        for chunk in chunks:
            self._make_room(len(chunk))
            part.write(chunk)
            part.flush()
            digest.update(chunk)
        return digest.hexdigest()

    def keep(self, part: BinaryIO, sha256: str) -> BinaryIO:
        """Let a claimed file be that of its content, as find() gives it."""
        path = self._path(sha256)
        with self._locked():  # so that it is not deleted before it is locked again
            if (there := self._open(sha256)) is not None:
                return there
            Path(part.name).replace(path)
            fcntl.flock(part, fcntl.LOCK_SH)
            self._verified.add(_facts(part, sha256))
            file = path.open("rb")
            fcntl.flock(file, fcntl.LOCK_SH)
            return file

    def drop(self, path: Path) -> None:
        """Delete a file that nobody uses any more."""
        with self._locked():
            _delete_unused(path)

    def _open(self, sha256: str) -> BinaryIO | None:
        """The file of a content, locked; None if it is not there, or not what it was.

        It is read through when a process first opens it.
        """
        path = self._path(sha256)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_at(file, path):
            facts = _facts(file, sha256)
            if facts in self._verified or hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                self._verified.add(facts)
                os.utime(path)
                return file
            path.unlink()
        file.close()
        return None

    def _make_room(self, num_bytes: int) -> None:
        """Delete what was used longest ago, and by nobody now, until so many bytes may be added."""
        with self._locked():
            files = sorted(self._files())
            excess = sum(size for _, size, _ in files) + num_bytes - self.max_bytes
            for _, size, path in files:
                if excess > 0 and _delete_unused(path):
                    excess -= size
        if excess > 0:
            raise LoraError(
                f"it does not fit into the {self.max_bytes} bytes that fetched LoRAs may take, "
                "beside those in use",
                "Try again when there is less to do",
            )

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Of each file, whole or in part: when it was last used, its bytes, its path."""
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # a part is deleted by whoever claimed it
                if path.suffix in (SUFFIX, _PART):
                    yield path.stat().st_mtime_ns, path.stat().st_size, path

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}{SUFFIX}"

    def _index(self) -> dict[str, dict[str, Any]]:
        with suppress(FileNotFoundError, ValueError):
            index = json.loads((self.folder / "index.json").read_text())
            return index if isinstance(index, dict) else {}
        return {}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _facts(file: BinaryIO, sha256: str) -> tuple[str, int, int]:
    status = os.fstat(file.fileno())
    return sha256, status.st_ino, status.st_size


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still what lies at a path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _lock(file: BinaryIO) -> bool:
    """Whether a file could be locked for this alone, at once."""
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _delete_unused(path: Path) -> bool:
    """Whether a file was deleted, which it is not while anybody has it locked."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        if _lock(file):
            path.unlink()
            return True
    return False
