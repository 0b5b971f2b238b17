"""Whole pictures by the lean models: plain's, to within 1/255."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_ways import Clock
from model_folders import pixels_of

from dmd2.engine.batch_limits import warm_up
from dmd2.engine.engine import Engine
from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning
from dmd2.fast.ways import WAYS
from dmd2.model_card import ModelCard
from dmd2.models.loading import load_parts
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways


@pytest.fixture(scope="module", params=["full", "low"])
def engines(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Engine]]:
    """One with the plain models and one with the lean, with all memory and with tiles."""
    card, is_low = ModelCard.read(model_folder), request.param == "low"
    parts = load_parts(model_folder, torch.device("cpu"), torch.float32, low_memory=is_low)
    if is_low:  # a picture of 512 pixels would take a test's time
        parts.vae.tile_sample_min_size, parts.vae.tile_latent_min_size = 64, 8
    pipelines = [Pipeline(card, parts) for _ in range(2)]
    warm_up(pipelines[1], 4, Tuning("force"))
    pair = tuple(Engine(p, tmp_path_factory.mktemp("outputs")) for p in pipelines)
    yield pair
    for engine in pair:
        engine.close()


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize(
    "inputs",
    [
        {"num_outputs": 3},
        {"guidance_scale": 3.0, "negative_prompt": "blue"},
        {"width": 104, "height": 72, "num_inference_steps": 2},
    ],
    ids=str,
)
def test_pictures_are_plain_s(engines: tuple[Engine, Engine], inputs: dict[str, Any]) -> None:
    request = GenerationRequest.resolve(engines[0].card, prompt="a circle", seed=7, **inputs)
    plain, lean = (engine.submit(request).result(timeout=60) for engine in engines)
    assert lean.ways == {"step": "lean", "decode": "lean"} != plain.ways
    for one, other in zip(plain.paths, lean.paths, strict=True):
        assert np.abs(pixels_of(one) - pixels_of(other)).max() <= 1


@pytest.mark.parametrize("part", ["step", "decode"])
def test_one_that_is_not_faster_leaves_plain(
    part: str, own_pipeline: Pipeline, said: Callable[[], str]
) -> None:
    (way,) = (way for way in WAYS if (way.name, way.part) == ("lean", part))
    clock = Clock()  # which nothing else moves

    def pass_time(*_: Any) -> None:
        clock.seconds += 0.1

    def late(plain: Any) -> Any:
        model = way.build(plain)
        inside = model if part == "step" else model.decoder
        inside.register_forward_pre_hook(pass_time)
        return model

    request = GenerationRequest.resolve(own_pipeline.card, prompt="warm up", seed=0)
    ways = [replace(way, build=late)]
    choose_ways(own_pipeline, request, Tuning("quick"), Budget(60, clock), ways)
    assert (own_pipeline.unet.way, own_pipeline.vae.way) == ("plain", "plain")
    assert "is not faster" in said()
