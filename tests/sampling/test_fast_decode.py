"""fast_decode: a tiny decoder in the VAE's place, where it is installed and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from components import write_fast_decoder
from diffusers import AutoencoderTiny
from model_folders import StockDiffusers, give_card, pixels_of
from random_model import write_random_model

from dmd2.engine.engine import Engine
from dmd2.errors import InvalidRequestError, ModelError
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.store.manifest import write_record


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a random TAESDXL, smaller than the real one, is installed."""
    return write_fast_decoder(tmp_path_factory.mktemp("weights") / "taesdxl").parent


def test_it_equals_stock_diffusers_with_the_tiny_vae(
    model_folder: Path, weights_dir: Path, tmp_path: Path
) -> None:
    engine = Engine(Pipeline.load(model_folder, "cpu", components=weights_dir), tmp_path)
    both = [
        GenerationRequest.resolve(engine.card, prompt="a star", seed=5, fast_decode=fast)
        for fast in (True, False)
    ]
    futures = [engine.submit(request) for request in both]
    fast, full = (pixels_of(future.result().paths[0]) for future in futures)
    engine.close()
    stock = StockDiffusers(model_folder)
    assert np.abs(full - stock.image(both[1], 0)).max() <= 1
    stock.decode_with(AutoencoderTiny.from_pretrained(weights_dir / "taesdxl"))
    assert np.abs(fast - stock.image(both[0], 0)).max() <= 1
    assert np.abs(fast - full).mean() > 5


def test_without_it_the_error_says_how_to_install_it(pipeline: Pipeline) -> None:
    with pytest.raises(InvalidRequestError, match="`scripts/download-weights taesdxl`") as caught:
        GenerationRequest.resolve(pipeline.card, prompt="x", fast_decode=True)
    assert caught.value.field == "fast_decode"


def test_a_model_with_other_latents_refuses_it(weights_dir: Path, tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "other")
    give_card(folder, {"4": [999, 749, 499, 249]}, fast_decoder=None)
    card = Pipeline.load(folder, "cpu", components=weights_dir).card
    with pytest.raises(InvalidRequestError, match="other has no fast decoder"):
        GenerationRequest.resolve(card, prompt="x", fast_decode=True)


def test_a_damaged_decoder_stops_setup(
    model_folder: Path, weights_dir: Path, tmp_path: Path
) -> None:
    AutoencoderTiny(in_channels=1).save_pretrained(tmp_path / "taesdxl")
    config = (weights_dir / "taesdxl" / "config.json").read_text()
    (tmp_path / "taesdxl" / "config.json").write_text(config)
    write_record(tmp_path / "taesdxl", {"model": "taesdxl"})
    with pytest.raises(ModelError, match="taesdxl does not fit its config"):
        Pipeline.load(model_folder, "cpu", components=tmp_path)
