"""How many bytes outputs may take together, and which of them may go for others.

Cog's server reads a prediction's files after predict has returned, and never says when it has. But
a file that was read has been accessed after it was written, on every file system that notes that;
and where none is noted, it is left for as long as handing over may take.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from dmd2.server.janitor import OUTPUT_NAMES
from dmd2.settings import HANDING_OVER_S

log = logging.getLogger(__name__)

# After its request is over, an output that was read stays for so long: an upload may read it again.
_QUIET_S = 5.0
# As much is freed at once, so that not every new output has all others looked at.
_FREED_SHARE = 0.1
_LOOK_AT_OTHERS_S = 60.0


class OutputSpace:
    """The bytes in some folders; shared by the threads that write there.

    Args:
        folder: of the outputs.
        max_bytes: the most that it and others may hold.
        others: whose content counts too, and is not this class's to delete.
        handing_over_s: after so long without a reader a request's output may go.
        in_flight_s: the longest that a request takes. What lies there at the start may be another
            server's, and counts as over so long after its last change.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        others: Sequence[Path] = (),
        handing_over_s: float = HANDING_OVER_S,
        in_flight_s: float = 0.0,
    ) -> None:
        self.max_bytes = max_bytes
        self._folder, self._others, self._handing_over_s = folder, others, handing_over_s
        self._in_others, self._looked_at_others = 0, -math.inf
        self._used = self._look()
        self._rooms: dict[Path, int] = {}
        self._ended: deque[tuple[Path, float]] = deque()
        self._over: dict[Path, float] = dict(self._left_behind(in_flight_s))
        self._lock = threading.Lock()

    def held_bytes(self) -> int:
        """Bytes that are there, as far as the last request has shown; waits for nobody."""
        return self._used

    def over(self, folder: Path) -> None:
        """Nothing more will be written into a folder, but its files may still be read.

        Waits for nobody: the server's event loop calls it.
        """
        self._ended.append((folder, time.monotonic()))

    def make_room(self, folder: Path, num_bytes: int) -> bool:
        """Whether so many bytes may be written into a folder, until it is over.

        Old outputs go for them. A folder that has room keeps it.
        """
        with self._lock:
            self._note_the_ended()
            if folder in self._rooms:
                return True
            wanted = sum(self._rooms.values()) + num_bytes
            is_old = time.monotonic() - self._looked_at_others > _LOOK_AT_OTHERS_S
            if is_old or self._used + wanted > self.max_bytes:
                self._used = self._look()
                self._free(self._used + wanted - self.max_bytes)
            if self._used + wanted > self.max_bytes:
                return False
            self._rooms[folder] = num_bytes
            return True

    def written(self, folder: Path, num_bytes: int) -> None:
        """So many bytes of a folder's room are taken."""
        with self._lock:
            self._used += num_bytes
            if folder in self._rooms:
                self._rooms[folder] = max(0, self._rooms[folder] - num_bytes)

    def _left_behind(self, in_flight_s: float) -> list[tuple[Path, float]]:
        """The folders that are there, oldest first, with when the clock says that they are over.

        What was read is over: Cog's server reads after the request's end.
        """
        ago, left = time.monotonic() - time.time(), []
        with suppress(OSError):  # a folder that cannot be read is the health check's business
            for path in self._folder.iterdir():
                changes = [status.st_mtime for status in _files_in(path)]
                if changes and OUTPUT_NAMES.fullmatch(path.name):
                    left.append(
                        (path, max(changes) + ago + (0 if _was_read(path) else in_flight_s))
                    )
        return sorted(left, key=lambda entry: entry[1])

    def _note_the_ended(self) -> None:
        """Take over what has ended, and forget the oldest that the janitor has deleted."""
        while self._ended:
            folder, at = self._ended.popleft()
            self._rooms.pop(folder, None)
            self._over[folder] = at
            for oldest in [each for each in islice(self._over, 2) if not each.exists()]:
                del self._over[oldest]

    def _look(self) -> int:
        """Bytes that are there; in the others as of a minute ago, since they may hold thousands."""
        if time.monotonic() - self._looked_at_others > _LOOK_AT_OTHERS_S:
            self._in_others = sum(map(size_of, self._others))
            self._looked_at_others = time.monotonic()
        return size_of(self._folder) + self._in_others

    def _free(self, needed: int) -> None:
        """Delete what may go, oldest first, until so many bytes are free and some more."""
        if needed <= 0:
            return
        self._over = {folder: at for folder, at in self._over.items() if folder.exists()}
        wanted, deleted = needed + self.max_bytes * _FREED_SHARE, 0
        for folder in list(self._that_may_go()):
            if deleted >= wanted:
                break
            before = size_of(folder)
            shutil.rmtree(folder, ignore_errors=True)
            deleted += before - size_of(folder)
            if not folder.exists():
                del self._over[folder]
        self._used -= deleted
        if deleted:
            log.info("deleted %d bytes of outputs that were handed over", deleted)

    def _that_may_go(self) -> Iterator[Path]:
        now = time.monotonic()
        for folder, at in self._over.items():
            if now - at >= self._handing_over_s or (now - at >= _QUIET_S and _was_read(folder)):
                yield folder


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder, which need not exist."""
    return sum(status.st_size for status in _files_in(folder))


def _was_read(folder: Path) -> bool:
    return all(status.st_atime_ns > status.st_mtime_ns for status in _files_in(folder))


def _files_in(folder: Path) -> Iterator[os.stat_result]:
    """The status of each file in a folder, some of which may be going."""
    for inside, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                yield Path(inside, name).lstat()
