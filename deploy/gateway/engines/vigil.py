"""An engine that will never serve again ends its process, so that its end is a death like others.

What it holds is then done by another engine, or by this one's successor. Whoever answered in its
place would have to be kept from being given more work.
"""

from __future__ import annotations

import asyncio
import threading
import time

from dmd2.engine.breakdown import end_process
from dmd2.engine.engine import Engine

_LOOK_S = 0.5
_POLL_S = 0.05


class Vigil:
    """Watches an engine, from a thread of its own, until both are closed.

    Args:
        engine: that is ready. Its process ends soon after its device has been in one unit of work
            for longer than a request may run, or after its thread has ended.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_closing, self._is_over = False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dmd2-vigil", daemon=True)
        self._thread.start()

    async def unit_ended(self) -> None:
        """Return once the device has ended the unit of work that it is in now.

        If it never does, the process ends.
        """
        began = time.monotonic()
        while self._engine.tally.unit_age_s() > time.monotonic() - began:
            await asyncio.sleep(_POLL_S)

    def close(self) -> None:
        """Close the engine after the unit in progress; if that does not end, the process does."""
        self._is_closing = True
        self._engine.close()
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(_LOOK_S):
            problem = self._engine.problem()
            is_ended = self._is_closing and self._engine.tally.unit_age_s() == 0
            if problem is not None and not is_ended:
                end_process(problem)
