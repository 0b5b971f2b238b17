"""benchmarks/overhead.py: that its models do nothing, and that the engine does all the rest."""

from __future__ import annotations

import time
from typing import Any

import overhead
import pytest


def test_a_row_has_both_times_and_its_aim() -> None:
    row = overhead.row(64, 8, units=10)
    assert (row["size"], row["images"], row["aim_ms"]) == (64, 8, 2.0)
    assert row["thread_ms"] > 0
    assert row["wall_ms"] > 0
    assert overhead.row(128, 1, units=10)["aim_ms"] is None


def test_what_the_models_take_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every five units four are steps; one of 10 ms each makes 8 of a unit."""
    call = overhead.IdleUNet.__call__

    def busy(self: overhead.IdleUNet, *arguments: Any, **named: Any) -> Any:
        began = time.thread_time()
        while time.thread_time() - began < 0.01:
            pass
        return call(self, *arguments, **named)

    idle = overhead.row(64, 2, units=25)
    monkeypatch.setattr(overhead.IdleUNet, "__call__", busy)
    assert overhead.row(64, 2, units=25)["thread_ms"] > idle["thread_ms"] + 4
