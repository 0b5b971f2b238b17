"""DMD2_MEMORY=low: the same pictures, but for the seams of the decoder's tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import StockDiffusers, pixels_of

from dmd2.engine.engine import Engine
from dmd2.models import loading, text_encoder, weight_sets
from dmd2.models.text_encoder import _run
from dmd2.models.weight_sets import WeightSets
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraUse
from dmd2.sampling.pipeline import Pipeline


def make(folder: Path, outputs: Path, side: int) -> tuple[GenerationRequest, Path]:
    pipeline = Pipeline.load(folder, "cpu", memory="low")
    assert pipeline.low_memory
    engine = Engine(pipeline, outputs)
    request = GenerationRequest.resolve(
        engine.card, prompt="a red circle", seed=7, width=side, height=side
    )
    (path,) = engine.submit(request).result().paths
    engine.close()
    return request, path


def test_a_picture_of_one_tile_is_the_same(
    model_folder: Path, stock: StockDiffusers, tmp_path: Path
) -> None:
    request, path = make(model_folder, tmp_path, 64)
    assert np.abs(pixels_of(path) - stock.image(request, 0)).max() <= 1


def test_larger_pictures_are_decoded_in_tiles_as_diffusers_does(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_TILE_SIDE", 64)
    request, path = make(model_folder, tmp_path, 128)
    stock = StockDiffusers(model_folder)
    whole = stock.image(request, 0)
    stock.decode_in_tiles(64)
    assert np.abs(pixels_of(path) - stock.image(request, 0)).max() <= 1
    assert np.abs(pixels_of(path) - whole).max() > 1


def test_auto_looks_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert not loading.is_low("auto", cpu)
    assert loading.is_low("low", cpu)
    for gigabytes, low in ((8.3, True), (12.6, False), (85, False)):
        properties = type("Properties", (), {"total_memory": int(gigabytes * 1e9)})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
        assert loading.is_low("auto", cuda) == low
        assert not loading.is_low("full", cuda)


def test_weights_with_loras_lie_where_the_models_do_and_have_room_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of text encoders in the host's memory take none of the UNet's."""

    def merge(weights: dict[str, torch.Tensor], loras: object) -> dict[str, torch.Tensor]:
        return {"weight": torch.zeros_like(weights["weight"])}

    monkeypatch.setattr(weight_sets, "merge", merge)
    unet, encoder = torch.nn.Linear(9, 9, device="meta"), torch.nn.Linear(2, 2)
    sets = WeightSets({"unet": unet, "text_encoder": encoder})
    assert sets.max_bytes == 4 * (81 + 9), "as much as the models take where they take most"
    sets.max_bytes = 4 * 81
    parts = ("unet", "text_encoder")
    first, second = (
        LoraUse(name, name, 1.0, {part: {"weight": None} for part in parts}) for name in "ab"
    )
    for part, model in zip(parts, (unet, encoder), strict=True):
        with sets.using(part, [first]):
            assert model.weight.device == model.bias.device
    assert sets.to_merge(parts, [first]) == 0
    sets.max_bytes = 4 * 4
    with sets.using("text_encoder", [second]):
        assert sets.to_merge(["text_encoder"], [first]) == 4 / (81 + 9)
    assert sets.to_merge(["unet"], [first]) == 0


def test_encoders_run_where_they_do_not_lie(pipeline: Pipeline) -> None:
    (encoder, _) = pipeline._text_encoder._encoders
    before = {name: tensor.data_ptr() for name, tensor in encoder.state_dict().items()}
    output = _run(encoder, torch.zeros(1, 77, dtype=torch.int64, device="meta"))
    assert output[0].device.type == "meta"
    assert {name: t.data_ptr() for name, t in encoder.state_dict().items()} == before


def test_encoders_are_called_directly_where_they_lie(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower(*_: object) -> None:
        raise AssertionError("weights were put in the place of those that are there")

    monkeypatch.setattr(text_encoder, "functional_call", slower)
    asked = GenerationRequest.resolve(pipeline.card, prompt="nobody has asked for this", seed=7)
    (conditioning,) = pipeline.encode([asked])
    assert conditioning.embeds[0].prompt_embeds.isfinite().all()
