"""From pixels to files, on threads of its own: what leaves, and in which form."""

from __future__ import annotations

import math
import queue
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
        """Whether a request may write so many bytes into its folder, until it is over."""

    def written(self, folder: Path, num_bytes: int) -> None:
        """So many of them were written."""

    def over(self, folder: Path) -> None:
        """Nothing more will be written there, and nobody waits for it."""


@dataclass
class _Saving:
    """What a job has to do with the threads that save.

    Attributes:
        waiting: its images until there is room for all of them.
        is_let_in: whether there is.
        num_writing: its images that those threads have.
    """

    waiting: list[tuple[Any, ...]] = field(default_factory=list)
    is_let_in: bool = False
    num_writing: int = 0


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
        self._lock = threading.Lock()
        self._jobs: dict[Job, _Saving] = {}
        # Requests come in one after the other, and with room for all of their images: else each
        # could wait for ever for what the others hold.
        self._at_the_door: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._door = threading.Thread(target=self._let_in_all, name="dmd2-door", daemon=True)
        self._door.start()
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
                f"files of {request.width}x{request.height} may take up to {most} bytes together, "
                f"and this server keeps at most {self._space.max_bytes} (DMD2_MAX_OUTPUT_BYTES)",
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
            self._take(image.job, image.index, pixels, flagged, score)

    def over(self, job: Job) -> None:
        """Nobody waits for a job any more; what it was answered may still be read."""
        with self._lock:
            saving = self._jobs.get(job)
            if saving is None or saving.num_writing:  # then its last writer comes here again
                return
            del self._jobs[job]
        if self._space is not None:
            self._space.over(self._folder(job))

    def close(self) -> None:
        """Stop after the images that were taken; those that wait for space fail."""
        self._closing = True
        self._at_the_door.put(None)
        self._door.join()
        self._savers.shutdown()

    def _take(self, job: Job, *image: Any) -> None:
        with self._lock:
            saving = self._jobs.get(job)
            is_new = saving is None
            if saving is None:
                saving = self._jobs[job] = _Saving(is_let_in=self._space is None)
            if saving.is_let_in:
                self._submit(job, saving, image)
            else:
                saving.waiting.append(image)
        if is_new:
            job.future.add_done_callback(lambda _: self.over(job))
            if not saving.is_let_in:
                self._at_the_door.put(job)

    def _submit(self, job: Job, saving: _Saving, image: tuple[Any, ...]) -> None:
        saving.num_writing += (
            1  # first, since what cannot be given a thread is in the queue already
        )
        self._savers.submit(self._save, job, *image)

    def _let_in_all(self) -> None:
        while (job := self._at_the_door.get()) is not None:
            self._let_in(job)

    def _let_in(self, job: Job) -> None:
        """Have a job's images saved, those that are there and those to come, once there is room."""
        assert self._space is not None
        folder = self._folder(job)
        try:
            while not job.over and not self._space.make_room(
                folder, image_io.most_bytes(job.request)
            ):
                if self._closing:
                    raise GenerationError("the engine was closed before there was space for it")
                time.sleep(_LOOK_S)
            with self._lock:
                saving = self._jobs.get(job)
                if saving is not None and not job.over:
                    saving.is_let_in = True
                    while saving.waiting:
                        self._submit(job, saving, saving.waiting.pop(0))
                    return
        except Exception as error:
            job.fail(_unsaved(error))
        self.over(job)
        if job not in self._jobs:  # it was over before it came in, and may have been given room
            self._space.over(folder)

    def _save(
        self, job: Job, index: int, pixels: NDArray[np.uint8], flagged: bool, score: float | None
    ) -> None:
        """Write one image's file, unless nobody waits for it any more."""
        try:
            if not job.over:
                if flagged and self._safety == "blur":
                    pixels = blurred(pixels)
                data = image_io.encode(pixels, job.request, index)
                path = self._write(job, index, data)
                job.settle(index, Outcome(path, flagged, score))
        except Exception as error:  # a full or read-only disk ends this request only
            job.fail(_unsaved(error, index))
        with self._lock:
            self._jobs[job].num_writing -= 1
        if job.over:
            self.over(job)

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


def _unsaved(error: Exception, index: int = 0) -> GenerationError:
    failure = GenerationError(f"image {index} could not be saved: {error}")
    failure.__cause__ = error
    return failure
