"""Model folders as stock diffusers saves them with the pinned packages, in every legal form."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from model_folders import StockDiffusers, copy_with, give_card, pixels_of

from dmd2.engine.engine import Engine
from dmd2.models import vae
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline

WEIGHTS = "unet/diffusion_pytorch_model"


def assert_parity(folder: Path, outputs: Path, variant: str | None = None) -> None:
    """Of an image that all of the model has a part in."""
    engine = Engine(Pipeline.load(folder, "cpu"), outputs)
    request = GenerationRequest.resolve(
        engine.card, prompt="a red circle", seed=7, num_inference_steps=2
    )
    (path,) = engine.submit(request).result(timeout=60).paths
    expected = StockDiffusers(folder, variant=variant).image(request, 0)
    assert np.abs(pixels_of(path) - expected).max() <= 1
    engine.close()


def saved(stock: StockDiffusers, folder: Path, **how: Any) -> Path:
    stock.save(folder, **how)
    return give_card(folder, {"2": [999, 499]})


def test_as_it_is_saved(stock: StockDiffusers, tmp_path: Path) -> None:
    folder = saved(stock, tmp_path / "m")
    assert (folder / "tokenizer" / "tokenizer.json").exists()
    assert not (folder / "tokenizer" / "vocab.json").exists(), "transformers 5 saves one file"
    assert_parity(folder, tmp_path / "out")


def test_the_older_form_of_tokenizers_without_a_map_of_special_tokens(
    model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "m")
    for path in folder.glob("tokenizer*/*"):
        if path.name not in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            path.unlink()
    assert_parity(folder, tmp_path / "out")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded(variant: str | None, stock: StockDiffusers, tmp_path: Path) -> None:
    folder = saved(stock, tmp_path / "m", max_shard_size="200KB", variant=variant)
    middle = "" if variant is None else f".{variant}"
    assert (folder / f"{WEIGHTS}.safetensors.index{middle}.json").exists()
    assert len(list(folder.glob(f"{WEIGHTS}{middle}-*.safetensors"))) > 1
    assert_parity(folder, tmp_path / "out", variant)


def test_the_variant_fp16(model_folder: Path, tmp_path: Path) -> None:
    half = saved(StockDiffusers(model_folder, torch.float16), tmp_path / "m", variant="fp16")
    assert (half / f"{WEIGHTS}.fp16.safetensors").exists()
    assert_parity(half, tmp_path / "out", "fp16")


def test_of_both_the_whole_weights_are_taken_and_that_is_said(
    stock: StockDiffusers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(stock, tmp_path / "m")
    (folder / f"{WEIGHTS}.fp16.safetensors").write_bytes(b"not even weights")
    with caplog.at_level(logging.INFO, "dmd2.models.strict_weights"):
        assert_parity(folder, tmp_path / "out")
    assert "diffusion_pytorch_model.safetensors is loaded, and" in caplog.text
    assert "diffusion_pytorch_model.fp16.safetensors is not" in caplog.text


def test_a_vae_that_overflows_decodes_in_float32_as_stock_does(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_with(
        model_folder, tmp_path / "m", "vae/config.json", lambda c: c.update(force_upcast=True)
    )
    with caplog.at_level(logging.INFO, "dmd2.models.loading"):
        pipeline = Pipeline.load(folder, "cpu", "float16")
    assert "decodes in float32, as in stock" in caplog.text
    assert (pipeline.dtype, pipeline.vae.plain.dtype) == (torch.float16, torch.float32)
    asked = GenerationRequest.resolve(pipeline.card, prompt="x", seed=7)
    sample = pipeline.start(asked, 0, *pipeline.encode([asked]))
    while not sample.trajectory.done:
        sample.trajectory.advance(sample.trajectory.latents)
    (picture,) = pipeline.decode([sample])
    # What stock makes of the latents, for which it casts the whole VAE to float32.
    stock = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.inference_mode():
        expected, _ = vae.decode(stock, sample.trajectory.latents[None])
    assert np.abs(picture.pixels().astype(int) - expected[0].numpy()).max() <= 1
    assert Pipeline.load(folder, "cpu", "bfloat16").vae.plain.dtype == torch.bfloat16
