"""The end of a process whose device is of no use, which nothing may hold up."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dmd2.engine.breakdown import EXIT_BROKEN
from dmd2.settings import ROOT

ENDING = """
import logging, threading
from dmd2.engine import breakdown

breakdown._LAST_WORDS_S = 0.2
logging.basicConfig()
threading.Thread(target=threading.Event().wait).start()
if {is_held}:
    threading.Thread(target=logging.root.handlers[0].acquire).start()
breakdown.end_process("it hangs")
"""


@pytest.mark.parametrize("is_held", [False, True])
def test_the_process_ends_whatever_its_threads_are_stuck_in(is_held: bool) -> None:
    """One of them in the midst of a line of the log, too."""
    command = [sys.executable, "-c", ENDING.format(is_held=is_held)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == EXIT_BROKEN
    assert is_held or "it hangs, so this process ends" in done.stderr
