"""From pixels to files, on threads of its own: what leaves, and in which form."""

from __future__ import annotations

import math
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dmd2.engine import image_io
from dmd2.engine.job import Job, JobImage, Outcome
from dmd2.engine.units import Finished
from dmd2.errors import GenerationError, InvalidRequestError
from dmd2.models.safety import blurred, is_flagged
from dmd2.request.generation_request import GenerationRequest
from dmd2.settings import SafetyMode

_SAVE_THREADS = 4
_LOOK_S = 0.2


class Space(Protocol):
    """What bounds the bytes that outputs take together."""

    max_bytes: int

    def make_room(self, folder: Path, num_bytes: int) -> bool:
        """Whether a request may write so many bytes into its folder, until it is released."""

    def written(self, folder: Path, num_bytes: int) -> None:
        """So many of them were written."""

    def release(self, folder: Path) -> None:
        """The request writes no more."""

    def over(self, folder: Path) -> None:
        """Nor does anybody wait for it."""


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
        # Requests come in one after the other, and with room for all of their images: else each
        # could wait for ever for what the others hold.
        self._door = ThreadPoolExecutor(1, thread_name_prefix="dmd2-door")
        self._savers = ThreadPoolExecutor(_SAVE_THREADS, thread_name_prefix="dmd2-save")

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request whose files could be more than all outputs may be.

        Raises:
            InvalidRequestError: they could.
        """
        most = image_io.most_bytes(request)
        if self._space is not None and most > self._space.max_bytes:
            raise InvalidRequestError(
                "num_outputs",
                request.num_outputs,
                f"files of {request.width}x{request.height} could be {most} bytes together, and "
                f"this server keeps at most {self._space.max_bytes} (DMD2_MAX_OUTPUT_BYTES)",
                "Ask for fewer or smaller images",
            )

    def take(self, image: JobImage, finished: Finished) -> None:
        """Deliver an image, unless nobody waits for it or it must not leave."""
        pixels, score, checked = finished
        score = None if score is None or math.isnan(score) else score
        flagged = checked and is_flagged(score)
        if flagged and self._safety == "withhold":
            image.job.settle(image.index, Outcome(None, flagged, score))
        elif not image.job.over:
            self._door.submit(self._let_in, image.job, image.index, pixels, flagged, score)

    def over(self, job: Job) -> None:
        """Nobody waits for a job any more; what it was answered may still be read."""
        if self._space is not None:
            self._space.over(self._folder(job))

    def close(self) -> None:
        """Stop after the images that were taken; those that wait for space fail."""
        self._closing = True
        self._door.shutdown()
        self._savers.shutdown()

    def _let_in(self, job: Job, *what: Any) -> None:
        """Have an image saved once there is room for its request."""
        try:
            if self._has_room(job):
                self._savers.submit(self._save, job, *what)
        except Exception as error:
            job.fail(_unsaved(what[0], error))

    def _has_room(self, job: Job) -> bool:
        """Wait for a request's room, unless it has it; False if by then nobody waits for it."""
        if self._space is None:
            return True
        folder, most = self._folder(job), image_io.most_bytes(job.request)
        while not job.over and not self._space.make_room(folder, most):
            if self._closing:
                raise GenerationError("the engine was closed before there was space for it")
            time.sleep(_LOOK_S)
        if job.over:  # perhaps only now, so that nobody else would give its room back
            self._space.release(folder)
            return False
        return True

    def _save(
        self, job: Job, index: int, pixels: NDArray[np.uint8], flagged: bool, score: float | None
    ) -> None:
        """Write one image's file."""
        try:
            if flagged and self._safety == "blur":
                pixels = blurred(pixels)
            data = image_io.encode(pixels, job.request, index)
            path = self._write(job, index, data)
            job.settle(index, Outcome(path, flagged, score))
        except Exception as error:  # a full or read-only disk ends this request only
            job.fail(_unsaved(index, error))
        if self._space is not None and job.over:
            self._space.release(self._folder(job))

    def _write(self, job: Job, index: int, data: bytes) -> Path:
        folder = self._folder(job)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex[:12]}-{index}.{job.request.files.output_format}"
        image_io.write(path, data)
        if self._space is not None:
            self._space.written(folder, len(data))
        return path

    def _folder(self, job: Job) -> Path:
        return self._output_dir / job.name


def _unsaved(index: int, error: Exception) -> GenerationError:
    failure = GenerationError(f"image {index} could not be saved: {error}")
    failure.__cause__ = error
    return failure
