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


def assert_counts_flat(usages: Sequence[Usage]) -> None:
    """No more file descriptors and threads, but for a few, in a run's last third than before."""
    middle, last = _later_thirds(usages)
    assert max(u.fds for u in last) <= max(u.fds for u in middle) + MORE_FDS
    assert max(u.threads for u in last) <= max(u.threads for u in middle) + MORE_THREADS


def assert_memory_flat(usages: Sequence[Usage], max_growth: float) -> None:
    """The last third's median resident memory against the second's: what a batch takes wavers."""
    before, after = (statistics.median(u.rss_mb for u in part) for part in _later_thirds(usages))
    print(f"median memory: {before:.1f} MB, then {after:.1f} MB")
    assert after <= before * (1 + max_growth), f"{before} MB, then {after} MB"


def _later_thirds(usages: Sequence[Usage]) -> tuple[Sequence[Usage], Sequence[Usage]]:
    """All but the first third, which is warm-up."""
    third = len(usages) // 3
    return usages[third:-third], usages[-third:]
