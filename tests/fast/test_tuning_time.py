"""The choice among ways: within which time, and how much of it a way may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_ways import Clock, FakeModel, bench_for, way_of

from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning, tune

QUICK = Tuning()


@pytest.mark.parametrize(
    ("plain_s", "part", "num_calls", "is_tried"),
    [
        (0.3, "decode", 1, True),
        (0.49, "decode", 1, True),
        (0.51, "decode", 1, False),
        (0.29, "step", 2, True),
        (0.31, "step", 2, False),
        (30.0, "decode", 1, False),
    ],
)
def test_a_way_is_tried_where_plains_time_fits(
    plain_s: float, part: Any, num_calls: int, is_tried: bool, said: Callable[[], str]
) -> None:
    """A first call, and one of each kind for each input: of 0.3 s a decode is tried, no step."""
    clock = Clock()
    bench = bench_for(clock, plain_s, part, num_calls)
    model = FakeModel(clock, [plain_s / 2])
    tune(bench, QUICK, Budget(1.5, clock), [way_of(model, part=part)])
    assert bench.runner.way == ("fake" if is_tried else "plain")
    assert clock.seconds <= 1.5
    if not is_tried:
        assert (model.num_calls, clock.seconds) == (0, 0)
        assert f"not tried: it would take about {plain_s * (1 + 2 * num_calls):.1f} s" in said()


@pytest.mark.parametrize(("plain_s", "is_tried"), [(0.11, True), (0.13, False)])
def test_what_a_first_call_is_known_to_take_has_to_fit_too(
    plain_s: float, is_tried: bool, said: Callable[[], str]
) -> None:
    clock = Clock()
    model = FakeModel(clock, [1.0, plain_s / 2])
    bench = bench_for(clock, plain_s)
    tune(bench, QUICK, Budget(1.5, clock), [way_of(model, first_s=1.0)])
    assert bench.runner.way == ("fake" if is_tried else "plain")
    assert ("not tried: it would take about 1.5 s" in said()) != is_tried


@pytest.mark.parametrize("seconds", [[0.1], [0.4], [1.0], [0.05, 0.7], [10.0], [0.05, 10.0]])
@pytest.mark.parametrize("num_ways", [1, 3])
def test_the_budget_is_passed_by_one_call_of_a_slow_way_at_most(
    seconds: list[float], num_ways: int
) -> None:
    """A call that has begun cannot be stopped, so that is all that may be too much."""
    clock = Clock()
    bench = bench_for(clock, 0.05)
    models = [FakeModel(clock, seconds) for _ in range(num_ways)]
    tune(bench, QUICK, Budget(1.5, clock), [way_of(model) for model in models])
    assert clock.seconds <= 1.5 + max(seconds)
    assert bench.runner.way == "plain"


def test_a_first_call_that_takes_all_time_is_said(said: Callable[[], str]) -> None:
    clock = Clock()
    bench = bench_for(clock, 0.02)
    tune(bench, QUICK, Budget(1.5, clock), [way_of(FakeModel(clock, [1.6, 0.001]))])
    assert bench.runner.way == "plain"
    assert "found no time to be judged" in said()


def test_a_median_of_few_pairs_has_to_be_clearer(said: Callable[[], str]) -> None:
    clock = Clock()
    for way_s, used in ((0.38, "plain"), (0.3, "fake")):
        bench = bench_for(clock, 0.4, "decode", 1)
        tune(bench, QUICK, Budget(1.5, clock), [way_of(FakeModel(clock, [way_s]), part="decode")])
        assert bench.runner.way == used
    assert "is not faster: 0.95 of plain, 0.9 would do" in said()


@pytest.mark.parametrize(("way_s", "num_pairs"), [(0.01, 1), (0.015, 3), (0.03, 3)])
@pytest.mark.parametrize("num_calls", [1, 2])
def test_no_more_pairs_are_timed_than_settle_it(
    way_s: float, num_pairs: int, num_calls: int
) -> None:
    clock = Clock()
    model, bench = FakeModel(clock, [way_s]), bench_for(clock, 0.02, num_calls=num_calls)
    tune(bench, QUICK, Budget(1.5, clock), [way_of(model)])
    assert model.num_calls == 1 + max(num_pairs, num_calls)
    assert bench.runner.way == ("fake" if way_s < 0.02 else "plain")


def test_a_budget_does_not_charge_what_setup_owes() -> None:
    clock = Clock()
    budget = Budget(1.5, clock)
    with budget.uncharged():
        clock.seconds += 10
    clock.seconds += 1
    assert budget.left() == pytest.approx(0.5)
    clock.seconds += 1
    assert budget.left() == 0
