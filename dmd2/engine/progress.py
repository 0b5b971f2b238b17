"""How far the GPU thread has come, for whoever waits at a terminal."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from dmd2.engine.job import JobImage

log = logging.getLogger(__name__)


class ProgressFile:
    """A file that gets a line of JSON for each image of each unit of work that was done.

        {"kind": "step", "seconds": 1.25, "num_inference_steps": 4, "num_outputs": 2}

    kind is the unit's and seconds its own, divided by its images; the rest is the image's request.

    Args:
        path: of the file, which is appended to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, kind: str, images: Sequence[JobImage], seconds: float) -> None:
        """A unit of work was done; what cannot be written is lost, with a line in the log."""
        lines = [
            json.dumps(
                {
                    "kind": kind,
                    "seconds": seconds / len(images),
                    "num_inference_steps": image.job.request.num_inference_steps,
                    "num_outputs": image.job.request.num_outputs,
                }
            )
            for image in images
        ]
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            log.warning("%s takes no progress: %s", self._path, error)
