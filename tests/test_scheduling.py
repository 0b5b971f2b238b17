"""Which images run next."""

from __future__ import annotations

from dmd2.scheduling import FirstComeFirstServed


def test_the_oldest_request_runs_until_it_is_done() -> None:
    schedule: FirstComeFirstServed[str] = FirstComeFirstServed()
    assert not schedule
    schedule.add(["a0", "a1"])
    schedule.add(["b0"])
    assert schedule.next_batch() == ["a0", "a1"]
    schedule.remove("a0")
    assert schedule.next_batch() == ["a1"]
    schedule.remove("a1")
    assert schedule.next_batch() == ["b0"]
    schedule.remove("b0")
    assert not schedule


def test_removing_what_is_gone_changes_nothing() -> None:
    schedule: FirstComeFirstServed[str] = FirstComeFirstServed()
    schedule.add(["a0", "a1"])
    schedule.remove("a0")
    schedule.remove("a0")
    assert schedule.next_batch() == ["a1"]
