"""The choice among ways: what is used, what is not, and why."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_ways import FACTS, PLAIN_OUTPUT, Clock, FakeModel, bench_for, call, raising, way_of

from dmd2.errors import DMD2Error
from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning, tune
from dmd2.fast.ways import WAYS, Way
from dmd2.models import device_work

QUICK = Tuning()
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_faster_way_is_used_and_its_cold_call_does_not_count(said: Callable[[], str]) -> None:
    clock = Clock()
    bench = bench_for(clock, 0.02)
    seconds = tune(bench, QUICK, Budget(1.5, clock), [way_of(FakeModel(clock, [0.9, 0.01]))])
    assert bench.runner.way == "fake"
    assert seconds == pytest.approx(0.01)
    first, row = said().splitlines()
    assert first == "trying way fake for a step"
    assert "10.00 ms, plain    20.00 ms, error 0e+00: used" in row


def test_the_fastest_of_several_is_used(said: Callable[[], str]) -> None:
    clock = Clock()
    models = [FakeModel(clock, [seconds]) for seconds in (0.015, 0.008, 0.012)]
    ways = [way_of(model, f"number {i}") for i, model in enumerate(models)]
    bench = bench_for(clock, 0.02)
    tune(bench, QUICK, Budget(1.5, clock), ways)
    assert bench.runner.way == "number 1"
    assert said().count("another is faster") == 2


def test_ways_of_the_other_part_are_left_alone() -> None:
    clock = Clock()
    model = FakeModel(clock, [0.001])
    bench = bench_for(clock, 0.02, part="decode")
    tune(bench, QUICK, Budget(1.5, clock), [way_of(model, part="step")])
    assert (bench.runner.way, model.num_calls) == ("plain", 0)


def not_built(plain: Any) -> Any:
    raise ValueError("no lean decoder is known for a Thing")


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "build": ({"build": not_built}, "failed: ValueError: no lean decoder"),
    "unsuited": ({"suits": lambda facts: "no CUDA"}, "no CUDA"),
    "first call": ({"output": raising(RuntimeError("no kernel image"))}, "no kernel image"),
    "later call": ({"output": raising(RuntimeError("odd"), at=2)}, "failed: RuntimeError: odd"),
    "out of memory": ({"output": raising(MEMORY, at=1)}, "OutOfMemoryError"),
    "not finite": ({"output": lambda _: PLAIN_OUTPUT / 0}, "is not finite"),
    "wrong": ({"output": lambda _: PLAIN_OUTPUT * 1.00002}, "too far from plain"),
    "another shape": ({"output": lambda _: PLAIN_OUTPUT[:, :1]}, "in place of"),
    "slow": ({"seconds": [0.021]}, "is not faster"),
    "hardly faster": ({"seconds": [0.0199]}, "is not faster"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_whatever_is_wrong_leaves_plain_and_is_said(failure: str, said: Callable[[], str]) -> None:
    clock = Clock()
    more, why = FAILURES[failure]
    model = FakeModel(
        clock, more.get("seconds", [0.01]), more.get("output", lambda _: PLAIN_OUTPUT)
    )
    way = replace(way_of(model), **{k: v for k, v in more.items() if k in ("build", "suits")})
    bench = bench_for(clock, 0.02)
    assert tune(bench, QUICK, Budget(1.5, clock), [way]) == pytest.approx(0.02)
    assert bench.runner.way == "plain"
    lines = said().splitlines()
    assert why in lines[-1]
    assert (lines[0] == "trying way fake for a step") == (failure != "unsuited")
    assert bench.runner(lambda model: model()).equal(PLAIN_OUTPUT)


@pytest.mark.parametrize(("compiles", "setting"), [(False, "DMD2_TUNE=off"), (True, "COMPILE=0")])
@pytest.mark.parametrize("at", [0, 1])
def test_one_that_breaks_the_device_is_named_with_the_way_out(
    at: int, compiles: bool, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on CUDA refuses everything, giving memory back included."""
    error = RuntimeError("CUDA error: an illegal memory access was encountered")

    def refuse() -> None:
        raise error

    monkeypatch.setattr(device_work, "give_back_memory", refuse)
    monkeypatch.setattr(device_work, "is_broken", lambda device: device == FACTS.device)
    clock = Clock()
    way = way_of(FakeModel(clock, [0.01], raising(error, at)), "bad", compiles=compiles)
    said = rf"way bad for a step failed: RuntimeError: CUDA error: an illegal.*{setting}"
    with pytest.raises(DMD2Error, match=said):
        tune(bench_for(clock, 0.02), Tuning(compile=compiles), Budget(1.5, clock), [way])


def test_one_that_fails_does_not_keep_the_next_from_being_tried() -> None:
    clock = Clock()
    broken = way_of(FakeModel(clock, [0.01], raising(RuntimeError("odd"))), "broken")
    bench = bench_for(clock, 0.02)
    tune(bench, QUICK, Budget(1.5, clock), [broken, way_of(FakeModel(clock, [0.01]), "whole")])
    assert bench.runner.way == "whole"


def test_two_images_are_judged_beside_one_and_need_their_time(said: Callable[[], str]) -> None:
    clock = Clock()
    for first_s, output, used in (
        (0.01, lambda _: PLAIN_OUTPUT, "fake"),
        (0.01, lambda number: PLAIN_OUTPUT * (2 if number == 3 else 1), "plain"),
        (1.25, lambda _: PLAIN_OUTPUT, "plain"),
    ):
        bench = replace(bench_for(clock, 0.05), pair=call)
        way = way_of(FakeModel(clock, [first_s, 0.03], output))
        tune(bench, QUICK, Budget(1.5, clock), [way])
        assert bench.runner.way == used
    assert "is too far from plain" in said()
    assert "found no time to be judged on two images" in said()
    bench = replace(bench_for(clock, 0.2), pair=call)
    tune(bench, QUICK, Budget(1.5, clock), [way_of(FakeModel(clock, [0.1]))])
    assert "not tried: it would take about 1.8 s" in said()


@pytest.mark.parametrize("seconds", [0.01, 0.03])
def test_what_a_used_way_includes_is_not_tried(seconds: float) -> None:
    clock = Clock()
    part = FakeModel(clock, [0.015])
    whole = way_of(FakeModel(clock, [seconds]), "whole", includes="part")
    bench = bench_for(clock, 0.02)
    tune(bench, QUICK, Budget(1.5, clock), [whole, way_of(part, "part")])
    used, num_calls = ("whole", 0) if seconds < 0.02 else ("part", 4)
    assert (bench.runner.way, part.num_calls) == (used, num_calls)


def test_only_the_chosen_model_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    kept: list[weakref.ref[FakeModel]] = []

    def build(seconds: float) -> FakeModel:
        model = FakeModel(clock, [seconds])
        kept.append(weakref.ref(model))
        return model

    left: list[list[bool]] = []
    look = lambda: left.append([ref() is not None for ref in kept])  # noqa: E731
    monkeypatch.setattr(device_work, "give_back_memory", look)
    times = (0.015, 0.03, 0.01)
    ways = [Way(str(s), "step", lambda plain, s=s: build(s)) for s in times]  # type: ignore[misc]
    bench = bench_for(clock, 0.02)
    tune(bench, QUICK, Budget(1.5, clock), ways)
    assert left == [[True, False], [False, False, True]]


def test_off_tries_nothing(said: Callable[[], str]) -> None:
    clock = Clock()
    model = FakeModel(clock, [0.001])
    bench = bench_for(clock, 0.02)
    tune(bench, Tuning("off"), Budget(1.5, clock), [way_of(model)])
    assert (bench.runner.way, model.num_calls, said()) == ("plain", 0, "")


def test_force_takes_what_can_be_built_without_a_look() -> None:
    clock = Clock()
    slow = FakeModel(clock, [99.0], lambda _: PLAIN_OUTPUT * 2)
    bench = replace(bench_for(clock, 0.02), calls=())
    ways = [Way("broken", "step", not_built), way_of(slow, "wrong"), way_of(slow, "next")]
    assert tune(bench, Tuning("force"), Budget(0, clock), ways) == pytest.approx(0.02)
    assert (bench.runner.way, slow.num_calls) == ("wrong", 0)


@pytest.mark.parametrize("mode", ["off", "quick", "force"])
def test_what_was_asked_for_takes_as_long_as_it_takes_and_is_used_if_it_is_close(
    mode: Any,
) -> None:
    clock = Clock()
    budget = Budget(1.5, clock)
    other = FakeModel(clock, [0.001])
    for output, used in ((PLAIN_OUTPUT, "compiled"), (PLAIN_OUTPUT * 2, None)):
        compiled = FakeModel(clock, [60.0, 0.03], lambda _, output=output: output)
        bench = bench_for(clock, 0.02)
        ways = [way_of(compiled, "compiled", compiles=True), way_of(other, "lean")]
        tune(bench, Tuning(mode, compile=True), budget, ways)
        fallback = "plain" if mode == "off" else "lean"
        assert bench.runner.way == (used or fallback)
        assert bench.runner.compiles == (used is not None)
    assert 0 < budget.left() <= 1.5
    assert budget.left() == pytest.approx(1.5, abs=0.2), "compiling was charged"


def test_compiled_ways_suit_where_they_are_asked_for() -> None:
    facts = replace(FACTS, device=torch.device("cuda", 0))
    for way in WAYS:
        asked, unasked = way.suits(replace(facts, compile=True)), way.suits(facts)
        assert asked is None
        assert unasked == ("DMD2_COMPILE is 0" if way.compiles else None)
    assert len({(way.part, way.name) for way in WAYS}) == len(WAYS)
    assert "plain" not in {way.name for way in WAYS}
