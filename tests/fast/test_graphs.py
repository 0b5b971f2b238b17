"""Graphs by a capture that a CPU can do: what is captured, copied and replayed, and what fails."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_capture import GRAPH, FakeCapture
from fake_ways import FACTS
from torch import nn

from dmd2.fast.graphs import Graphed, Replay

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class Model(nn.Module):
    """Tells its inputs apart, and counts its own calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor, times: torch.Tensor, *, more: Any, dtype: str) -> Any:
        self.batches.append(len(x))
        return [self.weight * x + times[:, None] + more["ids"]]


def inputs(batch: int, seed: int = 0, width: int = 3) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    x, ids = (torch.randn(batch, width, generator=generator) for _ in range(2))
    return (x, torch.arange(batch) + seed), {"more": {"ids": ids}, "dtype": "any"}


def call(model: Any, given: tuple[tuple[Any, ...], dict[str, Any]]) -> torch.Tensor:
    result: torch.Tensor = model(*given[0], **given[1])[0]
    return result


@pytest.fixture
def capture() -> FakeCapture:
    return FakeCapture()


@pytest.fixture
def warm(capture: FakeCapture) -> Graphed:
    """After its first call, of one image."""
    graphed = Graphed(Model(), capture)
    call(graphed, inputs(1))
    return graphed


def test_the_first_call_captures_twice_its_batch_and_then_its_own(
    warm: Graphed, capture: FakeCapture
) -> None:
    assert capture.captured == [2, 1]
    for batch in (2, 1, 2, 4):
        call(warm, inputs(batch))
    assert capture.captured == [2, 1], "captured after the first call"
    assert capture.num_replays == {1: 2, 2: 2}


def test_replays_in_any_order_return_what_the_model_returns_to_keep(warm: Graphed) -> None:
    model, order = Model(), [1, 2, 2, 1, 1, 2]
    given = [inputs(batch, seed) for seed, batch in enumerate(order)]
    results = [call(warm, each) for each in given]
    for each, result in zip(given, results, strict=True):
        assert result.equal(call(model, each))


def test_what_is_given_is_not_written_to(warm: Graphed) -> None:
    first, second = inputs(1, 1), inputs(1, 2)
    before = first[0][0].clone()
    call(warm, first)
    call(warm, second)
    assert first[0][0].equal(before)


def changed(given: tuple[tuple[Any, ...], dict[str, Any]], what: str) -> Any:
    """The same inputs, but for one thing."""
    (x, times), kwargs = given
    return {
        "batch": inputs(3),
        "width": inputs(1, width=4),
        "dtype": ((x.double(), times), kwargs),
        "another value": ((x, times), {**kwargs, "dtype": "other"}),
        "another key": ((x, times), {**kwargs, "more": {**kwargs["more"], "mask": x}}),
        "by name": ((x,), {**kwargs, "times": times}),
    }[what]


@pytest.mark.parametrize(
    "what", ["batch", "width", "dtype", "another value", "another key", "by name"]
)
def test_what_was_not_captured_is_called_as_the_model_is_written(
    what: str, warm: Graphed, capture: FakeCapture
) -> None:
    given, num_replays = changed(inputs(1), what), dict(capture.num_replays)
    result = call(warm, given)
    assert result.dtype == call(Model(), given).dtype
    assert result.equal(call(Model(), given))
    assert capture.num_replays == num_replays


def test_a_weight_that_is_changed_in_place_is_seen(warm: Graphed) -> None:
    with torch.inference_mode():
        warm._model.weight.fill_(-7.0)
    other = Model()
    other.weight.fill_(-7.0)
    assert call(warm, inputs(2)).equal(call(other, inputs(2)))


@pytest.mark.parametrize("fails", [("capture", 2), ("capture", 1), ("replay", 1), ("replay", 2)])
def test_after_a_failure_no_graph_is_left_and_no_call_passes_for_one(
    fails: tuple[str, int], capture: FakeCapture
) -> None:
    graphed = Graphed(Model(), capture)
    capture.fails[fails] = RuntimeError("operation failed due to a previous error during capture")
    if fails == ("replay", 2):
        call(graphed, inputs(1))
    with pytest.raises(RuntimeError, match="previous error"):
        call(graphed, inputs(fails[1] if fails[0] == "replay" else 1))
    captured, num_replays = list(capture.captured), dict(capture.num_replays)
    for batch in (1, 2):
        with pytest.raises(RuntimeError, match="given up when one failed"):
            call(graphed, inputs(batch))
    assert (capture.captured, capture.num_replays) == (captured, num_replays)
    assert graphed._graphs == []


def test_graphs_and_their_memory_go_with_the_way() -> None:
    taken: list[weakref.ref[torch.Tensor]] = []

    def keep(run: Callable[[], torch.Tensor]) -> Replay:
        output = run()
        taken.append(weakref.ref(output))
        return lambda: output

    graphed = Graphed(Model(), keep)
    call(graphed, inputs(1))
    assert [ref() is not None for ref in taken] == [True, True]
    gc.disable()  # a circle would keep them until a collection
    try:
        del graphed
        assert [ref() for ref in taken] == [None, None]
    finally:
        gc.enable()


def test_graphs_suit_a_gpu_with_memory_to_spare() -> None:
    cuda = replace(FACTS, device=torch.device("cuda", 0), dtype=torch.float16)
    assert GRAPH.suits(cuda) is None
    assert GRAPH.suits(FACTS) == "no CUDA"
    assert "DMD2_MEMORY=low" in str(GRAPH.suits(replace(cuda, low_memory=True)))
