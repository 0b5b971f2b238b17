"""What needs a CUDA GPU or SDXL's own weights: skipped elsewhere, with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import SDXL, StockDiffusers, pixels_of

from dmd2.engine.batch_limits import warm_up
from dmd2.engine.engine import Engine
from dmd2.errors import DeviceMemoryError
from dmd2.fast import tuning
from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.settings import TuneMode
from dmd2.store.manifest import Manifest, verify


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "mean_limit"), [("float32", 0.1), ("float16", 0.1), ("bfloat16", 0.6)]
)
def test_cuda_makes_the_pictures_of_the_cpu(
    dtype: str, mean_limit: float, model_folder: Path, tmp_path: Path
) -> None:
    pipeline = Pipeline.load(model_folder, "cuda", dtype)
    assert {p.device.type for p in pipeline.unet.plain.parameters()} == {"cuda"}
    engine = Engine(pipeline, tmp_path)
    request = GenerationRequest.resolve(engine.card, prompt="a red circle", seed=7, num_outputs=4)
    result = engine.submit(request).result()
    engine.close()
    stock = StockDiffusers(model_folder)
    for index, path in enumerate(result.paths):
        assert np.abs(pixels_of(path) - stock.image(request, index)).mean() <= mean_limit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_judge_lets_exact_ways_pass(
    dtype: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_FASTER", 1e9)
    pipeline = Pipeline.load(model_folder, "cuda", dtype)
    warm_up(pipeline, 1, None, Budget(60))
    assert (pipeline.unet.way, pipeline.vae.way) == ("lean", "lean")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["off", "force"])
def test_the_steps_never_wait_for_the_device(mode: TuneMode, model_folder: Path) -> None:
    pipeline = Pipeline.load(model_folder, "cuda")
    warm_up(pipeline, 1, Tuning(mode))
    requests = [
        GenerationRequest.resolve(pipeline.card, prompt="a red circle", seed=seed, guidance_scale=3)
        for seed in range(2)
    ]
    conditioning = pipeline.encode(requests)
    samples = [pipeline.start(r, 0, c) for r, c in zip(requests, conditioning, strict=True)]
    pipeline.step(samples)  # the first one makes cuDNN choose its kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        while not samples[0].trajectory.done:
            pipeline.step(samples)
        pictures = pipeline.decode(samples)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(picture.pixels().std() > 5 for picture in pictures)


@pytest.mark.gpu
def test_what_does_not_fit_into_a_small_gpu_is_an_error_and_nothing_more(
    model_folder: Path, tmp_path: Path
) -> None:
    engine = Engine(Pipeline.load(model_folder, "cuda"), tmp_path)
    sides = {"width": 2048, "height": 1952}
    large = GenerationRequest.resolve(engine.card, prompt="x", num_outputs=4, **sides)
    small = GenerationRequest.resolve(engine.card, prompt="x", seed=1)
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        with pytest.raises(DeviceMemoryError, match="DMD2_MEMORY=low"):
            engine.submit(large).result()
        assert engine.submit(small).result().paths[0].exists()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        engine.close()


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
