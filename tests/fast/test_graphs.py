"""Graphs by a capture that a CPU can do: what is captured, copied and replayed, and what fails."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_ways import FACTS
from model_folders import pixels_of
from torch import nn

from dmd2.engine.engine import Engine
from dmd2.fast import graphs
from dmd2.fast.budget import Budget
from dmd2.fast.graphs import Graphed, Replay
from dmd2.fast.tuning import Tuning
from dmd2.fast.unet import lean_unet
from dmd2.fast.ways import WAYS
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways

(GRAPH,) = (way for way in WAYS if way.name == "graph")
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class FakeCapture:
    """Calls a function again where CUDA would replay it; all results lie in one pool.

    Attributes:
        captured: the batches, in turn.
        num_replays: of each graph, by the batch of its result.
        fails: what is raised by the capture, or the replay, of so many.
    """

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.num_replays: dict[int, int] = {}
        self.fails: dict[tuple[str, int], Exception] = {}
        self._pool: list[torch.Tensor] = []

    def __call__(self, run: Callable[[], torch.Tensor]) -> Replay:
        output = run().clone()
        batch = len(output)
        self._raise("capture", batch)
        self.captured.append(batch)
        self.num_replays[batch] = 0
        self._pool.append(output.fill_(torch.nan))  # a capture computes nothing

        def replay() -> torch.Tensor:
            self._raise("replay", batch)
            self.num_replays[batch] += 1
            result = run()
            for spoilt in self._pool:
                spoilt.fill_(torch.nan)
            return output.copy_(result)

        return replay

    def _raise(self, what: str, batch: int) -> None:
        if (error := self.fails.get((what, batch))) is not None:
            raise error


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
def test_after_a_failure_no_graph_is_left_and_none_is_tried_again(
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
        assert call(graphed, inputs(batch)).equal(call(Model(), inputs(batch)))
    assert (capture.captured, capture.num_replays) == (captured, num_replays)


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


def test_a_pipeline_says_whether_it_is_low_on_memory(model_folder: Path) -> None:
    for memory, low in (("low", True), ("full", False)):
        assert Pipeline.load(model_folder, "cpu", memory=memory).low_memory == low


@pytest.fixture
def graphed_engine(
    model_folder: Path, capture: FakeCapture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """An engine on a pipeline whose UNet is called by fake graphs, from its next call on."""
    monkeypatch.setattr(graphs, "CudaCapture", lambda: capture)
    pipeline = Pipeline.load(model_folder, "cpu")
    request = GenerationRequest.resolve(pipeline.card, prompt="warm up", seed=0)
    way = replace(GRAPH, suits=lambda facts: None)
    choose_ways(pipeline, request, Tuning("force"), Budget(), [way])
    engine = Engine(pipeline, tmp_path / "graphed")
    yield engine
    engine.close()


def made(engine: Engine, **given: Any) -> tuple[list[Any], str]:
    """Pixels of a request's images, and the ways of its steps."""
    request = GenerationRequest.resolve(engine.card, prompt="a red circle", **given)
    result = engine.submit(request).result(timeout=30)
    return [pixels_of(path) for path in result.paths], result.ways["step"]


REQUESTS: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2, "guidance_scale": 3},
    {"seed": 3, "num_outputs": 3},
    {"seed": 4, "width": 72, "height": 64},
    {"seed": 5},
]


def test_pictures_are_those_of_the_lean_unet(
    graphed_engine: Engine, capture: FakeCapture, model_folder: Path, tmp_path: Path
) -> None:
    pipeline = Pipeline.load(model_folder, "cpu")
    pipeline.unet.adopt(GRAPH, lean_unet(pipeline.unet.plain))
    lean = Engine(pipeline, tmp_path / "lean")
    for given in REQUESTS:
        (got, way), (expected, _) = made(graphed_engine, **given), made(lean, **given)
        assert way == "graph"
        assert np.array_equal(got, expected)
    lean.close()
    assert capture.num_replays == {1: 8, 2: 4}


@pytest.mark.parametrize("error", [MEMORY, RuntimeError("cudaErrorStreamCaptureInvalidated")])
@pytest.mark.parametrize("fails", [("capture", 2), ("capture", 1), ("replay", 1), ("replay", 2)])
def test_a_failure_costs_the_way_and_no_picture(
    fails: tuple[str, int],
    error: Exception,
    graphed_engine: Engine,
    capture: FakeCapture,
    engine: Engine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    capture.fails[fails] = error
    with caplog.at_level(logging.WARNING, "dmd2.fast"):
        for given in REQUESTS[:2]:
            (got, _), (expected, _) = made(graphed_engine, **given), made(engine, **given)
            assert np.abs(np.array(got) - np.array(expected)).max() <= 1
    assert made(graphed_engine, seed=5)[1] == "plain"
    (record,) = caplog.records
    assert "way graph for a step is dropped for good: it failed: " in record.getMessage()


def test_it_is_tuned_and_judged_like_any_other(
    model_folder: Path, capture: FakeCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CudaCapture", lambda: capture)
    monkeypatch.setattr("dmd2.fast.tuning._FASTER", 1e9)
    pipeline = Pipeline.load(model_folder, "cpu")
    request = GenerationRequest.resolve(pipeline.card, prompt="warm up", seed=0)
    ways = [replace(GRAPH, suits=lambda facts: None), *WAYS]
    choose_ways(pipeline, request, Tuning("quick"), Budget(60), ways)
    assert pipeline.unet.way == "graph"
    assert capture.num_replays[1] >= 4
