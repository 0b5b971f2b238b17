"""Whether the disk can take another image."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dmd2.server.output_space import size_of

# A few dozen files of a megapixel.
_MIN_FREE_BYTES = 64_000_000


def space_for_outputs(folder: Path) -> int:
    """Bytes that outputs may take in a folder, by default: half of what is free above the floor.

    What lies there already counts as free. Where nothing is, which is a problem of its own, as much
    as the floor.
    """
    free = shutil.disk_usage(_existing(folder)).free + size_of(folder) - _MIN_FREE_BYTES
    return free // 2 if free > 0 else _MIN_FREE_BYTES


def disk_problem(folder: Path) -> str | None:
    """Why a folder, which need not exist yet, can take no more images; None if it can."""
    parent = _existing(folder)
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"{parent} is not writable"
    try:
        free = shutil.disk_usage(parent).free
    except OSError as error:
        return f"{parent} cannot be looked at: {error}"
    if free < _MIN_FREE_BYTES:
        return f"{parent} has {free / 1e6:.0f} MB free, and {_MIN_FREE_BYTES / 1e6:.0f} are needed"
    return None


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())
