"""The UNet of a real pipeline by graphs: its pictures, its failures, and how it is tuned."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_capture import GRAPH, FakeCapture
from model_folders import pixels_of

from dmd2.engine.engine import Engine
from dmd2.fast import graphs
from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning
from dmd2.fast.unet import lean_unet
from dmd2.fast.ways import WAYS
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_pipeline_says_whether_it_is_low_on_memory(model_folder: Path) -> None:
    for memory, low in (("low", True), ("full", False)):
        assert Pipeline.load(model_folder, "cpu", memory=memory).low_memory == low


@pytest.fixture
def capture() -> FakeCapture:
    return FakeCapture()


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
