"""The UNet of a real pipeline by graphs: its pictures, its failures, and how it is tuned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_capture import GRAPH, FakeCapture
from fake_ways import Clock
from model_folders import pixels_of

from dmd2.engine.engine import Engine
from dmd2.fast import graphs
from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning
from dmd2.fast.unet import lean_unet
from dmd2.fast.ways import WAYS, Way
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways
from dmd2.settings import TuneMode

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.fixture
def capture() -> FakeCapture:
    return FakeCapture()


@pytest.fixture
def graphed_engine(
    own_pipeline: Pipeline, capture: FakeCapture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """An engine on a pipeline whose UNet is called by fake graphs, from its next call on."""
    monkeypatch.setattr(graphs, "CudaCapture", lambda: capture)
    request = GenerationRequest.resolve(own_pipeline.card, prompt="warm up", seed=0)
    way = replace(GRAPH, suits=lambda facts: None)
    choose_ways(own_pipeline, request, Tuning("force"), Budget(), [way])
    engine = Engine(own_pipeline, tmp_path / "graphed")
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
    graphed_engine: Engine,
    capture: FakeCapture,
    new_pipeline: Callable[..., Pipeline],
    tmp_path: Path,
) -> None:
    pipeline = new_pipeline()
    pipeline.unet.adopt(GRAPH, lean_unet(pipeline.unet.plain))
    lean = Engine(pipeline, tmp_path / "lean")
    for given in REQUESTS:
        (got, way), (expected, _) = made(graphed_engine, **given), made(lean, **given)
        assert way == "graph"
        assert np.array_equal(got, expected)
    lean.close()
    assert capture.num_replays == {1: 8, 2: 4}


@pytest.mark.parametrize(
    ("fails", "error"),
    [
        (("capture", 2), MEMORY),
        (("capture", 1), RuntimeError("cudaErrorStreamCaptureInvalidated")),
        (("replay", 1), RuntimeError("cudaErrorLaunchFailure")),
        (("replay", 2), MEMORY),
    ],
)
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


def test_a_later_result_that_is_not_finite_costs_the_way_and_no_picture(
    graphed_engine: Engine,
    capture: FakeCapture,
    engine: Engine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert made(graphed_engine, seed=1)[1] == "graph"
    capture.spoils[1] = not_finite
    spoilt = made(graphed_engine, seed=5)
    capture.spoils.clear()  # so that nothing but having been dropped keeps the next from graphs
    for seed, (got, way) in ((5, spoilt), (6, made(graphed_engine, seed=6))):
        assert way == "plain"
        assert np.array_equal(got, made(engine, seed=seed)[0])
    assert capture.num_replays[1] == 8
    said = "way graph for a step is dropped for good: it returned what is not finite"
    assert said in caplog.text


def test_it_is_tuned_and_judged_like_any_other(
    own_pipeline: Pipeline, capture: FakeCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuned(own_pipeline, capture, monkeypatch, *WAYS) == "graph"
    assert capture.num_replays[1] >= 3
    assert capture.num_replays[2] == 1


def swapped(result: torch.Tensor) -> torch.Tensor:
    return result.flip(0)


def a_little_off(result: torch.Tensor) -> torch.Tensor:
    return result * (1 + 2e-5)


def not_finite(result: torch.Tensor) -> torch.Tensor:
    return result.index_fill(-1, torch.tensor([3]), torch.inf)


@pytest.mark.parametrize(
    ("spoilt", "batch", "why"),
    [
        (swapped, 2, "is too far from plain"),
        (a_little_off, 1, "is too far from plain"),
        (a_little_off, 2, "is too far from plain"),
        (not_finite, 1, "is not finite"),
        (not_finite, 2, "is not finite"),
    ],
)
def test_one_that_is_wrong_is_refused_for_two_images_too(
    spoilt: Any,
    batch: int,
    why: str,
    own_pipeline: Pipeline,
    capture: FakeCapture,
    monkeypatch: pytest.MonkeyPatch,
    said: Callable[[], str],
) -> None:
    """Nothing else calls a graph for two before a request does."""
    capture.spoils[batch] = spoilt
    assert tuned(own_pipeline, capture, monkeypatch) == "plain"
    assert why in said()


def test_one_that_is_not_faster_is_refused(
    own_pipeline: Pipeline,
    capture: FakeCapture,
    monkeypatch: pytest.MonkeyPatch,
    said: Callable[[], str],
) -> None:
    clock = Clock()  # which nothing else moves

    def late(result: torch.Tensor) -> torch.Tensor:
        clock.seconds += 0.1
        return result

    capture.spoils[1] = late
    assert tuned(own_pipeline, capture, monkeypatch, clock=clock) == "plain"
    assert "is not faster" in said()


@pytest.mark.parametrize(("mode", "what"), [("quick", "CudaCapture"), ("force", "lean_unet")])
def test_one_that_cannot_be_built_leaves_plain_and_its_picture(
    mode: TuneMode,
    what: str,
    own_pipeline: Pipeline,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    said: Callable[[], str],
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no pool of memory")

    monkeypatch.setattr(graphs, "CudaCapture", FakeCapture)
    monkeypatch.setattr(graphs, what, fail)
    request = GenerationRequest.resolve(own_pipeline.card, prompt="warm up", seed=0)
    way = replace(GRAPH, suits=lambda facts: None)
    choose_ways(own_pipeline, request, Tuning(mode), Budget(60), [way])
    assert "failed: RuntimeError: no pool of memory" in said()
    unbuilt = Engine(own_pipeline, tmp_path / "unbuilt")
    (got, way_of_steps), (expected, _) = made(unbuilt, seed=1), made(engine, seed=1)
    unbuilt.close()
    assert way_of_steps == "plain"
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("fails", [("capture", 2), ("capture", 1), ("replay", 1), ("replay", 2)])
def test_one_that_fails_at_setup_is_refused(
    fails: tuple[str, int],
    own_pipeline: Pipeline,
    capture: FakeCapture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture.fails[fails] = MEMORY
    assert tuned(own_pipeline, capture, monkeypatch) == "plain"


def tuned(
    pipeline: Pipeline,
    capture: FakeCapture,
    monkeypatch: pytest.MonkeyPatch,
    *others: Way,
    clock: Clock | None = None,
) -> str:
    """The UNet's way after setup has tried graphs, and others, whatever time they take.

    That matters by a clock alone.
    """
    monkeypatch.setattr(graphs, "CudaCapture", lambda: capture)
    if clock is None:
        monkeypatch.setattr("dmd2.fast.tuning._FASTER", 1e9)
        monkeypatch.setattr("dmd2.fast.tuning._CLEARLY_FASTER", 1e9)
    request = GenerationRequest.resolve(pipeline.card, prompt="warm up", seed=0)
    ways = [replace(GRAPH, suits=lambda facts: None), *others]
    budget = Budget(60) if clock is None else Budget(60, clock)
    choose_ways(pipeline, request, Tuning("quick"), budget, ways)
    return pipeline.unet.way
