"""What is called in place of a model: a way's first failure is its last."""

from __future__ import annotations

import logging

import pytest
import torch
from fake_ways import PLAIN_OUTPUT, Clock, FakeModel, call, raising, way_of

from dmd2.fast.runner import Runner
from dmd2.models import device_work

ERRORS = (
    RuntimeError("CUDA error: misaligned address"),
    torch.OutOfMemoryError("CUDA out of memory"),
    ValueError("of two\n  lines"),
    KeyError(),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_failing_way_is_dropped_for_good_with_one_line(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    plain, model = FakeModel(clock, [0]), FakeModel(clock, [0], raising(error, at=1))
    runner = Runner("step", plain)
    runner.adopt(way_of(model), model)
    assert runner(call).equal(PLAIN_OUTPUT)
    assert (runner.way, plain.num_calls) == ("fake", 0)
    with caplog.at_level(logging.WARNING, "dmd2.fast.runner"):
        assert runner(call).equal(PLAIN_OUTPUT)
        assert runner(call).equal(PLAIN_OUTPUT)
    tries = 2 if isinstance(error, torch.OutOfMemoryError) else 1
    assert (runner.way, plain.num_calls, model.num_calls) == ("plain", 2, 1 + tries)
    (record,) = caplog.records
    assert "way fake for a step is dropped for good: it failed: " in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_way_that_runs_out_of_memory_is_tried_once_more_with_what_is_given_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, given_back = Clock(), [0]

    def give_back_memory() -> None:
        given_back[0] += 1

    def in_pieces(number: int) -> torch.Tensor:
        if given_back[0] == 0:
            raise torch.OutOfMemoryError("5 GiB are reserved but unallocated")
        return PLAIN_OUTPUT

    monkeypatch.setattr(device_work, "give_back_memory", give_back_memory)
    plain, model = FakeModel(clock, [0]), FakeModel(clock, [0], in_pieces)
    runner = Runner("decode", plain)
    runner.adopt(way_of(model), model)
    assert runner(call) is PLAIN_OUTPUT
    assert (runner.way, model.num_calls, plain.num_calls, given_back) == ("fake", 2, 0, [1])
    assert caplog.records == []


def test_where_plain_fails_too_the_call_is_to_blame() -> None:
    clock = Clock()
    plain = FakeModel(clock, [0], raising(torch.OutOfMemoryError("of plain")))
    model = FakeModel(clock, [0], raising(torch.OutOfMemoryError("of the way")))
    runner = Runner("step", plain)
    runner.adopt(way_of(model), model)
    with pytest.raises(torch.OutOfMemoryError, match="of plain"):
        runner(call)
    assert runner.way == "fake"


def test_a_failed_way_holds_no_tensors_while_plain_runs() -> None:
    """What it took must be free before plain asks for as much."""
    import weakref

    clock, refs = Clock(), []

    def take_and_fail(number: int) -> torch.Tensor:
        taken = torch.empty(4)
        refs.append(weakref.ref(taken))
        raise RuntimeError("and the traceback holds this frame")

    def look(number: int) -> torch.Tensor:
        assert refs[0]() is None
        return PLAIN_OUTPUT

    model = FakeModel(clock, [0], take_and_fail)
    runner = Runner("step", FakeModel(clock, [0], look))
    runner.adopt(way_of(model), model)
    assert runner(call) is PLAIN_OUTPUT


def test_the_plain_model_can_be_asked_for() -> None:
    clock = Clock()
    plain, model = FakeModel(clock, [0]), FakeModel(clock, [0])
    runner = Runner("step", plain)
    runner.adopt(way_of(model), model)
    call(runner.plain)
    assert (plain.num_calls, model.num_calls, runner.way) == (1, 0, "fake")
