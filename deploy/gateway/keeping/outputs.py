"""Outputs of predictions that are kept: files of their own, whole or not there."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
import secrets
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from deploy.gateway.prediction import Prediction
from dmd2.errors import DMD2Error

Result = TypeVar("Result")

SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}
MEDIA_TYPES = {suffix: media_type for media_type, suffix in SUFFIXES.items()}
# 128 random bits: who was not told a name does not guess it.
NAMES = re.compile(r"[0-9a-f]{32}\.(?:png|jpg|webp)")
_TEMPORARY = ".part"
_ALL_NAMES = re.compile(rf"{NAMES.pattern}(?:{re.escape(_TEMPORARY)})?")
_NUM_THREADS = 4


class OutputsError(DMD2Error):
    """Outputs cannot be kept, or are not there any more."""


class Outputs:
    """A folder of outputs. All that takes long is done on its own threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="dmd2-gateway-outputs")

    async def keep(self, outputs: Sequence[bytes]) -> tuple[str, ...]:
        """Write outputs so that they outlive a power cut; the names of their files, in order.

        Args:
            outputs: `data:` URLs.

        Raises:
            OutputsError: the disk refuses them, or one is no image; none is kept.
        """
        return await self._on_a_thread(self._keep, outputs) if outputs else ()

    async def of(self, prediction: Prediction) -> tuple[bytes, ...]:
        """A prediction's outputs as `data:` URLs, from memory or from their files.

        Raises:
            OutputsError: one was deleted.
        """
        if prediction.outcome is not None and prediction.outcome.outputs:
            return prediction.outcome.outputs
        return await self.data_urls(prediction.files)

    async def data_urls(self, names: Sequence[str]) -> tuple[bytes, ...]:
        """The outputs as they were before they were kept.

        Raises:
            OutputsError: one was deleted.
        """
        return await self._on_a_thread(lambda: tuple(map(self._data_url, names))) if names else ()

    def path(self, name: str) -> Path | None:
        """Where the file of this name is; None where there is none, or the name is not an output's.

        Its suffix is a key of MEDIA_TYPES.
        """
        path = self._folder / name
        return path if NAMES.fullmatch(name) and path.is_file() else None

    def num_bytes(self, names: Sequence[str]) -> int:
        """What outputs take on the disk; those that are gone take nothing."""
        paths = [path for name in names if (path := self.path(name))]
        return sum(path.stat().st_size for path in paths)

    def remove(self, names: Sequence[str]) -> None:
        """Delete outputs; those that are gone already are none the less."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def remove_all_but(self, names: Collection[str]) -> None:
        """Delete all others, which a gateway that was killed may have left."""
        strays = [path for path in self._folder.iterdir() if path.name not in names]
        for path in strays:
            if _ALL_NAMES.fullmatch(path.name):
                path.unlink()

    def close(self) -> None:
        """End the threads, once they have written what they were given."""
        self._threads.shutdown()

    async def _on_a_thread(self, work: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def _keep(self, outputs: Sequence[bytes]) -> tuple[str, ...]:
        decoded = [_decoded(output) for output in outputs]
        names = [f"{secrets.token_hex(16)}{suffix}" for _, suffix in decoded]
        try:
            for name, (content, _) in zip(names, decoded, strict=True):
                self._write(name, content)
            _sync_folder(self._folder)
        except OSError as error:
            with suppress(OSError):
                self.remove([name + end for name in names for end in ("", _TEMPORARY)])
            raise OutputsError(f"the outputs could not be kept: {error.strerror}") from error
        return tuple(names)

    def _write(self, name: str, content: bytes) -> None:
        temporary = self._folder / (name + _TEMPORARY)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._folder / name)

    def _data_url(self, name: str) -> bytes:
        path = self.path(name)
        try:
            content = path.read_bytes() if path else None
        except FileNotFoundError:
            content = None
        if content is None:
            raise OutputsError("the outputs were deleted, by their age or to make room")
        media_type = MEDIA_TYPES[Path(name).suffix].encode()
        return b"data:" + media_type + b";base64," + base64.b64encode(content)


def _decoded(output: bytes) -> tuple[bytes, str]:
    """The content of a `data:` URL, and the suffix of its file."""
    head, _, content = output.partition(b";base64,")
    media_type = head.removeprefix(b"data:").decode("ascii", "replace")
    if media_type not in SUFFIXES:
        raise OutputsError(f"an output is not one of {', '.join(SUFFIXES)}, and cannot be kept")
    try:
        return base64.b64decode(content, validate=True), SUFFIXES[media_type]
    except binascii.Error as error:
        raise OutputsError("an output is not base64, and cannot be kept") from error


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
