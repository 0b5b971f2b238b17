"""Deletes what was written for requests that are long over; without it the disk fills up.

Cog's server reads the files after predict has returned and never deletes them, nor its own folder
of each prediction. So only age tells what nobody needs any more: an age that no request in flight
reaches, which dmd2/settings.py sees to.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

COGLET_PREDICTIONS = Path("/tmp/coglet/predictions")
# The names that dmd2/engine/job.py gives to requests: nothing else in the folder is ours to delete.
OUTPUT_NAMES = re.compile(r"[0-9a-f]{32}")
ALL_NAMES = re.compile(r".*", re.DOTALL)


class Janitor:
    """Sweeps folders from a thread of its own, until closed.

    Args:
        folders: whose entries are swept, and which names count; the folders need not exist.
        max_age_s: an entry goes when nothing in it was changed for so long.
        every_s: between two sweeps.
    """

    def __init__(
        self,
        folders: Sequence[tuple[Path, re.Pattern[str]]],
        max_age_s: float,
        every_s: float = 60.0,
    ) -> None:
        self._folders, self._max_age_s, self._every_s = folders, max_age_s, every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dmd2-janitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            for folder, names in self._folders:
                try:
                    sweep(folder, names, self._max_age_s)
                except OSError as error:  # the next sweep may do better
                    log.warning("%s could not be swept: %s", folder, error)


def sweep(folder: Path, names: re.Pattern[str], max_age_s: float) -> int:
    """Delete the entries in which nothing was changed for max_age_s seconds; how many there were.

    Links are deleted, never followed. What cannot be deleted stays, for the next sweep.
    """
    entries = list(folder.iterdir()) if folder.is_dir() else []
    old = [
        entry
        for entry in entries
        if names.fullmatch(entry.name) and time.time() - _last_change(entry) > max_age_s
    ]
    for entry in old:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if old:
        log.info("deleted %d entries of %s that were older than %g s", len(old), folder, max_age_s)
    return len(old)


def _last_change(entry: Path) -> float:
    """The latest change of an entry or of anything in it, in seconds since the epoch."""
    inside = os.walk(entry) if not entry.is_symlink() else ()
    paths = [entry, *(Path(folder, name) for folder, _, names in inside for name in ("", *names))]
    changes = []
    for path in paths:
        with suppress(FileNotFoundError):  # somebody else is deleting it
            changes.append(path.lstat().st_mtime)
    return max(changes, default=time.time())
