"""The thread that has the journal's old outputs removed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from dmd2.errors import DMD2Error

log = logging.getLogger(__name__)


class JournalJanitor:
    """Sweeps from a thread of its own, until closed.

    Args:
        sweep: removes what is too old, and says how many files went.
        every_s: between two sweeps.
    """

    def __init__(self, sweep: Callable[[], int], every_s: float = 60.0) -> None:
        self._sweep, self._every_s = sweep, every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dmd2-journal-janitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            try:
                if num_files := self._sweep():
                    log.info("removed %d old outputs", num_files)
            except (DMD2Error, OSError) as error:  # the next sweep may do better
                log.warning("old outputs could not be removed: %s", error)
