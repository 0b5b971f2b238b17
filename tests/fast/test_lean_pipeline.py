"""Whole pictures by the lean models: plain's, to within 1/255."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folders import pixels_of

from dmd2.engine.engine import Engine
from dmd2.fast.decoder import lean_decoder
from dmd2.fast.unet import lean_unet
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline


@pytest.fixture(scope="module", params=["full", "low"])
def engines(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Engine]]:
    """One with the plain models and one with the lean, with all memory and with tiles."""
    pipelines = [Pipeline.load(model_folder, "cpu", memory=request.param) for _ in range(2)]
    lean = pipelines[1]
    if request.param == "low":
        for pipeline in pipelines:  # a picture of 512 pixels would take a test's time
            pipeline._vae.tile_sample_min_size, pipeline._vae.tile_latent_min_size = 64, 8
    lean._unet, lean._vae = lean_unet(lean._unet), lean_decoder(lean._vae)
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
    plain, lean = (engine.submit(request).result(timeout=60).paths for engine in engines)
    for one, other in zip(plain, lean, strict=True):
        assert np.abs(pixels_of(one) - pixels_of(other)).max() <= 1
