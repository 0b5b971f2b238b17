"""From pixels to files, on threads of its own: what leaves, and in which form."""

from __future__ import annotations

import math
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dmd2.engine import image_io
from dmd2.engine.job import Job, JobImage, Outcome
from dmd2.engine.units import Finished
from dmd2.errors import GenerationError
from dmd2.models.safety import blurred, is_flagged
from dmd2.settings import SafetyMode

_SAVE_THREADS = 4
_LOOK_S = 0.2


class Space(Protocol):
    """What bounds the bytes that outputs take together."""

    max_bytes: int

    def make_room(self, num_bytes: int) -> bool:
        """Whether so many bytes may be written, which they then must be, or be given back."""

    def written(self, num_bytes: int) -> None:
        """What there was room for is written, or has failed."""

    def over(self, folder: Path) -> None:
        """The request whose output is in a folder has ended."""


class Delivery:
    """Takes finished images, and settles their jobs once they are files.

    Args:
        output_dir: each request gets a new folder in here for its files.
        safety: what becomes of a flagged image: "withhold", "blur", or "flag" (it leaves as it is).
        space: what bounds the bytes of all files; None for no bound.
    """

    def __init__(self, output_dir: Path, safety: SafetyMode, space: Space | None = None) -> None:
        self._space = space
        self._closing = False
        self._output_dir = output_dir
        self._safety = safety
        self._savers = ThreadPoolExecutor(_SAVE_THREADS, thread_name_prefix="dmd2-save")

    def take(self, image: JobImage, finished: Finished) -> None:
        """Deliver an image, unless nobody waits for it or it must not leave."""
        pixels, score, checked = finished
        score = None if score is None or math.isnan(score) else score
        flagged = checked and is_flagged(score)
        if flagged and self._safety == "withhold":
            image.job.settle(image.index, Outcome(None, flagged, score))
        elif not image.job.over:
            self._savers.submit(self._save, image.job, image.index, pixels, flagged, score)

    def over(self, job: Job) -> None:
        """Nobody waits for a job any more; what it was answered may still be read."""
        if self._space is not None:
            self._space.over(self._output_dir / job.name)

    def close(self) -> None:
        """Stop after the images that were taken; those that wait for space fail."""
        self._closing = True
        self._savers.shutdown()

    def _save(
        self, job: Job, index: int, pixels: NDArray[np.uint8], flagged: bool, score: float | None
    ) -> None:
        """Write one image's file."""
        try:
            if flagged and self._safety == "blur":
                pixels = blurred(pixels)
            data = image_io.encode(pixels, job.request, index)
            if not self._has_space(job, len(data)):
                return
            try:
                path = self._write(job, index, data)
            finally:
                if self._space is not None:
                    self._space.written(len(data))
            job.settle(index, Outcome(path, flagged, score))
        except Exception as error:  # a full or read-only disk ends this request only
            failure = GenerationError(f"image {index} could not be saved: {error}")
            failure.__cause__ = error
            job.fail(failure)

    def _write(self, job: Job, index: int, data: bytes) -> Path:
        folder = self._output_dir / job.name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex[:12]}-{index}.{job.request.files.output_format}"
        image_io.write(path, data)
        return path

    def _has_space(self, job: Job, num_bytes: int) -> bool:
        """Wait until so many bytes may be written; False if by then nobody waits for them."""
        if self._space is None:
            return True
        if num_bytes > self._space.max_bytes:
            raise GenerationError(
                f"it has {num_bytes} bytes, and all outputs together may have "
                f"{self._space.max_bytes} (DMD2_MAX_OUTPUT_BYTES)"
            )
        while not self._space.make_room(num_bytes):
            if job.over:
                return False
            if self._closing:
                raise GenerationError("the engine was closed before there was space for it")
            time.sleep(_LOOK_S)
        return True
