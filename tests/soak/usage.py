"""What a process uses, and that it stays so."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# More than ever in a run's second third, which is no growth yet.
MORE_FDS, MORE_THREADS = 8, 4


@dataclass(frozen=True)
class Usage:
    """What a process uses: resident memory in MB, open file descriptors, threads."""

    rss_mb: float
    fds: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        process = Path(f"/proc/{pid}")
        pages = int((process / "statm").read_text().split()[1])
        fds, threads = list((process / "fd").iterdir()), list((process / "task").iterdir())
        return cls(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(fds), len(threads))


def assert_flat(usages: Sequence[Usage], max_growth: float) -> None:
    """Nothing grows after the warm-up, which is the first third.

    Resident memory is compared by medians, since what a batch takes comes and goes; of file
    descriptors and threads there may be a few more than ever before.
    """
    third = len(usages) // 3
    middle, last = usages[third:-third], usages[-third:]
    before, after = (statistics.median(u.rss_mb for u in part) for part in (middle, last))
    assert after <= before * (1 + max_growth), f"{before} MB, then {after} MB"
    assert max(u.fds for u in last) <= max(u.fds for u in middle) + MORE_FDS
    assert max(u.threads for u in last) <= max(u.threads for u in middle) + MORE_THREADS
