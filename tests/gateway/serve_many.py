"""scripts/serve-many with one engine, as its user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from cog_server import free_port

from dmd2.settings import ROOT

STARTS_S = 240


def environment(**more: str) -> dict[str, str]:
    """A user's, but for the Python, which makes no environment."""
    return {**os.environ, "DMD2_PYTHON": sys.executable, "DMD2_DEVICE": "cpu", **more}


@contextmanager
def serving(
    model: Path | str, folder: Path, **more: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """scripts/serve-many on a model, READY: where it answers, and its process."""
    url, log = f"http://127.0.0.1:{(port := free_port())}", folder / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [ROOT / "scripts" / "serve-many", "--model", str(model)],
            env=environment(
                PORT=str(port),
                DMD2_JOURNAL_DIR=str(folder / "journal"),
                DMD2_OUTPUT_DIR=str(folder / "outputs"),
                DMD2_TUNE="off",
                DMD2_MAX_BATCH="4",
                **more,
            ),
            stderr=stderr,
            text=True,
        )
    try:
        deadline = time.monotonic() + STARTS_S
        while not is_ready(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield url, process
    finally:
        process.kill()
        process.wait()


def is_ready(url: str) -> bool:
    """Whether it takes requests."""
    try:
        return httpx.get(f"{url}/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
