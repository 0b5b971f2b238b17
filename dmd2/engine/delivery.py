"""From pixels to files, on threads of its own: what leaves, and in which form."""

from __future__ import annotations

import math
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmd2.engine import image_io
from dmd2.engine.job import Job, JobImage, Outcome
from dmd2.engine.units import Finished
from dmd2.errors import GenerationError
from dmd2.models.safety import blurred, is_flagged
from dmd2.settings import SafetyMode

_SAVE_THREADS = 4


class Delivery:
    """Takes finished images, and settles their jobs once they are files.

    Args:
        output_dir: each request gets a new folder in here for its files.
        safety: what becomes of a flagged image: "withhold", "blur", or "flag" (it leaves as it is).
    """

    def __init__(self, output_dir: Path, safety: SafetyMode) -> None:
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

    def close(self) -> None:
        """Stop after the images that were taken."""
        self._savers.shutdown()

    def _save(
        self, job: Job, index: int, pixels: NDArray[np.uint8], flagged: bool, score: float | None
    ) -> None:
        """Write one image's file."""
        try:
            if flagged and self._safety == "blur":
                pixels = blurred(pixels)
            data = image_io.encode(pixels, job.request, index)
            folder = self._output_dir / job.name
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = folder / f"{uuid.uuid4().hex[:12]}-{index}.{job.request.files.output_format}"
            image_io.write(path, data)
            job.settle(index, Outcome(path, flagged, score))
        except Exception as error:  # a full or read-only disk ends this request only
            failure = GenerationError(f"image {index} could not be saved: {error}")
            failure.__cause__ = error
            job.fail(failure)
