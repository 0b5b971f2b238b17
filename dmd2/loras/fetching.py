"""From what a user writes for a LoRA to a verified file."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from dmd2.errors import DMD2Error, DownloadError, InvalidRequestError, LoraError
from dmd2.loras.cache import Entry, LoraCache
from dmd2.loras.header import checked
from dmd2.loras.public_fetch import PublicFetch
from dmd2.loras.remotes import Download, Remote, listed, locate, name_of, of_commit
from dmd2.loras.sources import (
    SUFFIX,
    CivitaiFile,
    HubFile,
    LocalFile,
    WebFile,
    check_allowed,
    parse,
    without_secrets,
)
from dmd2.settings import LoraSource, Settings

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class LoraFile:
    """A verified file that stays where it is until it is closed; a context manager.

    Attributes:
        name: what logs and metadata call it; never a URL.
        path: of the file.
        sha256: of its content, in hexadecimal.
    """

    name: str
    path: Path
    sha256: str
    _file: BinaryIO = field(repr=False, compare=False)
    _cache: LoraCache | None = field(default=None, repr=False, compare=False)

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> LoraFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go when others need its room."""
        self._file.close()

    def discard(self) -> None:
        """Let a file of no use go, and out of the cache once nobody uses it; a local one stays."""
        self.close()
        if self._cache is not None:
            self._cache.drop(self.path)


class LoraFetcher:
    """Gets the files that references name, from the sources that the settings allow.

    Args:
        settings: lora_sources, lora_dir, lora_cache_dir and lora_cache_bytes are read.
        client: of the network; by default one that reaches public addresses alone.
        max_bytes: of a file.

    Raises:
        DMD2Error: a folder of the settings cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        client: PublicFetch | None = None,
        max_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self._allowed, self._folder = settings.lora_sources, settings.lora_dir
        self._hashes: dict[tuple[object, ...], str] = {}
        if "local" in self._allowed and not (self._folder and self._folder.is_dir()):
            raise DMD2Error(f"DMD2_LORA_DIR={self._folder} is not a folder")
        if set(self._allowed) - {"local"}:
            self._client = client or PublicFetch()
            self._cache = LoraCache(settings.lora_cache_dir, settings.lora_cache_bytes)
            self._max_bytes = min(max_bytes, self._cache.max_bytes)

    def get(
        self,
        field: str,
        text: object,
        cancelled: threading.Event,
        *,
        hf_api_token: str | None = None,
        civitai_api_token: str | None = None,
    ) -> LoraFile:
        """The file that a user means by a text.

        Args:
            field: the input that holds the text, for errors.
            text: as dmd2/loras/sources.py parses it.
            cancelled: set from another thread, it ends this soon.
            hf_api_token: is shown to the Hugging Face hub alone.
            civitai_api_token: is shown to Civitai alone.

        Raises:
            InvalidRequestError: it is not allowed, not there, not to be had, or no safetensors
                file; without tokens and without what a URL has behind its path.
            DownloadError: the cache's disk is full, or cannot be written.
            concurrent.futures.CancelledError: cancelled was set.
        """
        tokens: dict[LoraSource, str | None] = {
            "huggingface": _token("hf_api_token", hf_api_token),
            "civitai": _token("civitai_api_token", civitai_api_token),
        }
        if not isinstance(text, str):
            raise InvalidRequestError(field, text, "it must be text", "Send a string")
        try:
            if not self._allowed:
                raise LoraError(
                    "this server takes no LoRAs from requests (DMD2_LORA_SOURCES is empty)",
                    f"Leave {field} out, or have the operator set DMD2_LORA_SOURCES",
                )
            reference = parse(text)
            check_allowed(reference, self._allowed)
            if isinstance(reference, LocalFile):
                return self._local(reference)
            token = tokens.get(reference.source)
            return self._remote(reference, Remote(self._client, reference.source, token, cancelled))
        except LoraError as error:
            raise error.of_field(field, without_secrets(text)) from None
        except OSError as error:
            raise DownloadError(
                f"{field} could not be read or kept ({error.strerror}): have the operator look at "
                "DMD2_LORA_DIR and DMD2_LORA_CACHE_DIR"
            ) from error

    def _local(self, reference: LocalFile) -> LoraFile:
        assert self._folder is not None
        folder = self._folder.resolve()
        there = {
            path.name: path.resolve()
            for path in folder.iterdir()
            if path.suffix == SUFFIX and path.is_file() and path.resolve().is_relative_to(folder)
        }
        if reference.name not in there:
            raise LoraError(f"there is no such file; there are: {listed(there)}", "Use one of them")
        path = there[reference.name]
        file = path.open("rb")
        status = os.fstat(file.fileno())
        facts = (status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)
        if facts not in self._hashes:
            self._hashes[facts] = hashlib.file_digest(file, "sha256").hexdigest()
        return LoraFile(name_of(reference.name), path, self._hashes[facts], file)

    def _remote(self, reference: HubFile | CivitaiFile | WebFile, remote: Remote) -> LoraFile:
        if isinstance(reference, HubFile) and reference.is_pinned and reference.file:
            pinned = of_commit(reference.repo, reference.revision, reference.file, None)
            if (kept := self._kept(pinned)) is not None:
                return kept
        download = locate(reference, remote.ask)
        if (kept := self._kept(download)) is not None:
            return kept
        with self._cache.claim(download.key, remote.cancelled) as part:
            # Whoever had the claim before may have fetched it.
            return self._kept(download) or self._asked(download, remote, part)

    def _kept(self, download: Download) -> LoraFile | None:
        """What the cache has for all to use, and no server need be asked about."""
        if download.is_fixed and (found := self._cache.find(download.key, download.sha256)):
            entry, file = found
            if not entry.is_private:
                return self._lora_file(download, entry, file)
            file.close()
        return None

    def _asked(self, download: Download, remote: Remote, part: BinaryIO) -> LoraFile:
        """What the cache has, if its server lets this request have it still; else what it sends.

        So a file that came with a token is for nobody who could not get it without the cache.
        """
        found = self._cache.find(download.key, download.sha256)
        etag = "" if found is None or download.is_fixed else found[0].etag
        with ExitStack() as unless_kept:
            if found is not None:
                unless_kept.enter_context(found[1])
            with remote.get(download.url, self._max_bytes, etag) as answer:
                if found is not None and (answer.status == 304 or download.is_fixed):
                    unless_kept.pop_all()
                    return self._lora_file(download, *found)
                sha256 = self._cache.write(part, checked(answer.chunks(), answer.num_bytes))
        if download.sha256 not in (None, sha256):
            raise LoraError("its sha256 is not what its source says", "Try again later")
        entry = Entry(sha256, answer.etag, is_private=remote.token is not None)
        self._cache.remember(download.key, entry)
        log.info("fetched %s from %s: sha256 %s", download.name, remote.source, sha256)
        return self._lora_file(download, entry, self._cache.keep(part, sha256))

    def _lora_file(self, download: Download, entry: Entry, file: BinaryIO) -> LoraFile:
        return LoraFile(download.name, Path(file.name), entry.sha256, file, self._cache)


def _token(field: str, token: str | None) -> str | None:
    """A token that may stand in a header; empty is none."""
    if token and not re.fullmatch(r"[\x21-\x7e]{1,500}", token):
        raise InvalidRequestError(field, "(secret)", "it is no token", "Copy it again")
    return token or None
