"""What needs a CUDA GPU or SDXL's own weights: skipped elsewhere, with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SDXL
from model_folders import StockDiffusers, pixels_of

from dmd2.engine import Engine
from dmd2.pipeline import Pipeline
from dmd2.request import GenerationRequest
from dmd2.weights import Manifest, verify


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "mean_limit"), [("float32", 0.1), ("float16", 0.1), ("bfloat16", 0.6)]
)
def test_cuda_makes_the_pictures_of_the_cpu(
    dtype: str, mean_limit: float, model_folder: Path, tmp_path: Path
) -> None:
    pipeline = Pipeline.load(model_folder, "cuda", dtype)
    assert {p.device.type for p in pipeline._unet.parameters()} == {"cuda"}
    engine = Engine(pipeline, tmp_path)
    request = GenerationRequest.resolve(engine.card, prompt="a red circle", seed=7, num_outputs=4)
    result = engine.submit(request).result()
    engine.close()
    stock = StockDiffusers(model_folder)
    for index, path in enumerate(result.paths):
        assert np.abs(pixels_of(path) - stock.image(request, index)).mean() <= mean_limit


@pytest.mark.weights
def test_installed_sdxl_is_whole_and_loads() -> None:
    assert verify(Manifest.read().models["sdxl-4step"], SDXL) == []
    Pipeline.load(SDXL, "auto")


@pytest.mark.gpu
@pytest.mark.weights
def test_sdxl_equals_stock_diffusers_in_half_precision(tmp_path: Path) -> None:
    engine = Engine(Pipeline.load(SDXL, "cuda"), tmp_path)
    request = GenerationRequest.resolve(engine.card, prompt="a lighthouse in a storm", seed=7)
    (path,) = engine.submit(request).result().paths
    engine.close()
    expected = StockDiffusers(SDXL, torch.float16).to("cuda").image(request, 0)
    assert expected.std() > 20
    assert np.abs(pixels_of(path) - expected).mean() <= 6
