"""DMD2_COMPILE: the compiled models make the plain ones' pixels, and no request compiles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from model_folders import pixels_of
from torch._dynamo.utils import counters

from dmd2.engine.engine import Engine
from dmd2.fast.tuning import Tuning
from dmd2.models import vae
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++, on a CPU"
)


# Each of SDXL's kinds of block once: half as much to compile.
SHALLOW_UNET = {
    "block_out_channels": [32, 32],
    "transformer_layers_per_block": [1, 1],
    "attention_head_dim": [2, 2],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
SHALLOW_VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


@pytest.fixture(scope="module")
def shallow_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, as shallow as it may be."""
    folder = tmp_path_factory.mktemp("models") / "shallow"
    shutil.copytree(model_folder, folder)
    parts = {"unet": (UNet2DConditionModel, SHALLOW_UNET), "vae": (AutoencoderKL, SHALLOW_VAE)}
    for part, (kind, changes) in parts.items():
        config = json.loads((folder / part / "config.json").read_text())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kind.from_config({**config, **changes}).save_pretrained(folder / part)
    return folder


@pytest.fixture(scope="module")
def compiled(shallow_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine on a compiled pipeline, warm."""
    # torch 2.11's CUDA build dies in the first backward pass of a process that has compiled before.
    torch.ones(1, requires_grad=True).backward()
    torch.compiler.reset()
    counters.clear()
    pipeline = Pipeline.load(shallow_folder, "cpu")
    engine = Engine(pipeline, tmp_path_factory.mktemp("outputs"))
    engine.warm_up(max_batch=4, tuning=Tuning("off", compile=True))
    yield engine
    engine.close()
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.fixture(scope="module")
def plain(shallow_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine on the same model as it is written."""
    engine = Engine(Pipeline.load(shallow_folder, "cpu"), tmp_path_factory.mktemp("outputs"))
    yield engine
    engine.close()


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"num_outputs": 2},
        {"num_outputs": 3, "num_inference_steps": 2},
        {"num_outputs": 4},
        {"guidance_scale": 3.0, "negative_prompt": "blue"},
        {"width": 128, "height": 64},  # nothing was compiled for this size
    ],
)
def test_pixels_are_those_of_the_plain_models_and_nothing_is_compiled_for_them(
    compiled: Engine, plain: Engine, inputs: dict[str, object]
) -> None:
    assert compiled_graphs() == 3, "the UNet for one image and for any number, the decoder for one"
    request = GenerationRequest.resolve(plain.card, prompt="a red circle", seed=7, **inputs)
    fast, slow = (e.submit(request).result(timeout=60) for e in (compiled, plain))
    assert fast.ways == {"step": "compiled", "decode": "compiled"}
    assert slow.ways == {"step": "plain", "decode": "plain"}
    for one, other in zip(fast.paths, slow.paths, strict=True):
        assert np.abs(pixels_of(one) - pixels_of(other)).max() <= 1
    assert compiled_graphs() == 3


def test_a_decode_in_float32_runs_beside_a_compiled_decoder(
    compiled: Engine, plain: Engine
) -> None:
    latents = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)
    models = (compiled._pipeline.vae.plain, plain._pipeline.vae.plain)
    with torch.inference_mode():
        again, expected = (vae.decode_in_float32(model, latents) for model in models)
    assert (again.int() - expected.int()).abs().max() <= 1
    assert compiled_graphs() == 3
