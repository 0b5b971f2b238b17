"""How fast predictions come to their end, which says when a full queue may have room."""

from __future__ import annotations

import asyncio
import math
from collections import deque

MAX_RETRY_AFTER_S = 60
_NUM_LATEST = 32


class Pace:
    """The times of the latest ends, by the running event loop's clock."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=_NUM_LATEST)

    def count_end(self) -> None:
        """One more has come to its end, now."""
        self._ends.append(asyncio.get_running_loop().time())

    def retry_after_s(self, num_queued: int) -> int:
        """About how long a tenth of the queue takes: 1 to MAX_RETRY_AFTER_S whole seconds."""
        now = asyncio.get_running_loop().time()
        first = self._ends[0] if self._ends else now
        each_s = (now - first) / max(1, len(self._ends))
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(each_s * num_queued / 10)))
