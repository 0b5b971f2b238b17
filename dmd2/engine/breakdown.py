"""The end of a process whose device is of no use to it any more: a new one gets a new context."""

from __future__ import annotations

import logging
import os
import threading

log = logging.getLogger(__name__)

# sysexits' EX_SOFTWARE: nothing that a caller did.
EXIT_BROKEN = 70
_LAST_WORDS_S = 5.0


def end_process(why: str, error: BaseException | None = None) -> None:
    """Log why, and end this process with EXIT_BROKEN, whatever its other threads are stuck in.

    Args:
        why: as the beginning of a sentence.
        error: that told of it.
    """
    # A thread that is stuck may have the log's lock, or nobody reads what it writes.
    threading.Timer(_LAST_WORDS_S, os._exit, [EXIT_BROKEN]).start()
    log.critical("%s, so this process ends", why, exc_info=error)
    logging.shutdown()
    os._exit(EXIT_BROKEN)
