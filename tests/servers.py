"""Real servers under test, and what they answer."""

from __future__ import annotations

import base64
import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np
import psutil
from cog_server import CogServer, running
from PIL import Image


def start(
    model: Path | str, log: IO[bytes] | None = None, **environment: str
) -> AbstractContextManager[CogServer]:
    """A server on a model, not yet set up; it writes to log, or where this process does.

    It measures neither ways nor batch sizes: what is fast on a busy machine says nothing, and takes
    its time. scripts/serve in tests/test_scripts.py does.
    """
    fixed = {"DMD2_MODEL": str(model), "DMD2_DEVICE": "cpu", "DMD2_TUNE": "off"}
    return running({**fixed, "DMD2_MAX_BATCH": "4", **environment}, log)


def worker_of(server: CogServer) -> int:
    """The process id of a server's worker."""
    children = psutil.Process(server.process.pid).children()
    (worker,) = [child for child in children if "_run_worker" in " ".join(child.cmdline())]
    return int(worker.pid)


def images_of(response: dict[str, Any]) -> list[bytes]:
    assert response["status"] == "succeeded", response
    return [base64.b64decode(output.partition(",")[2]) for output in response["output"]]


def assert_alike(images: list[bytes], expected: list[bytes]) -> None:
    """Promise 1: in company or alone to within 1/255, which webp may quantise apart."""
    for image, twin in zip(images, expected, strict=True):
        with Image.open(io.BytesIO(image)) as first, Image.open(io.BytesIO(twin)) as second:
            difference = np.asarray(first).astype(int) - np.asarray(second).astype(int)
            largest, mean = (1, 0.2) if first.format == "PNG" else (32, 2)
            assert np.abs(difference).max() <= largest
            assert np.abs(difference).mean() <= mean, "another image differs by 5 and more"


def scrape(port: int) -> dict[str, float]:
    """The samples that a metrics port tells, by name and labels as they are written there."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {sample: float(value) for sample, _, value in lines}
