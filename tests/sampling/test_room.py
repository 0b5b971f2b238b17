"""A way that keeps memory is given up where one image would find none, at setup and later."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from dmd2.engine import batch_limits
from dmd2.engine.units import STEP
from dmd2.errors import DeviceMemoryError
from dmd2.fast import tuning
from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning
from dmd2.fast.ways import WAYS, Way
from dmd2.models import vae
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lane import Lane
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways
from dmd2.sampling.sample import Sample

KEEPS = Way("keeps", "step", lambda plain: lambda *a, **k: plain(*a, **k), keeps_memory=True)


@pytest.fixture
def tight(own_pipeline: Pipeline) -> Pipeline:
    """A pipeline that has taken such a way."""
    own_pipeline.unet.adopt(KEEPS, KEEPS.build(own_pipeline.unet.plain))
    return own_pipeline


def fits_without(pipeline: Pipeline, call: Callable[..., Any]) -> Callable[..., Any]:
    """A call that finds no memory as long as the way keeps some."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if pipeline.unet.keeps_memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return call(*args, **kwargs)

    return guarded


def new(pipeline: Pipeline, num_images: int = 1) -> list[Sample]:
    asked = GenerationRequest.resolve(
        pipeline.card, prompt="a red circle", seed=7, num_outputs=num_images
    )
    (conditioning,) = pipeline.encode([asked])
    return [pipeline.start(asked, index, conditioning) for index in range(num_images)]


def stepped(pipeline: Pipeline, samples: list[Sample]) -> list[Sample]:
    while not samples[0].trajectory.done:
        pipeline.step(samples)
    return samples


def pixels(pipeline: Pipeline) -> Any:
    (picture,) = pipeline.decode(stepped(pipeline, new(pipeline)))
    return picture.pixels()


@pytest.mark.parametrize("part", ["step", "decode", "decode in float32"])
def test_an_image_that_fits_only_without_it_is_made(
    part: str, tight: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = pixels(tight)
    if part == "step":  # such as its latents in float32, beside the model
        guarded = fits_without(tight, tight.unet_call)
        monkeypatch.setattr(tight, "unet_call", guarded)
    elif part == "decode":
        guarded = fits_without(tight, tight.vae.plain.decode)
        monkeypatch.setattr(tight.vae.plain, "decode", guarded)
    else:
        decode = vae.decode

        def overflowing(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found, is_finite = decode(model, latents)
            return found, is_finite & (model is not tight.vae.plain)

        monkeypatch.setattr(vae, "decode", overflowing)
        guarded = fits_without(tight, vae.decode_in_float32)
        monkeypatch.setattr(vae, "decode_in_float32", guarded)
    with caplog.at_level(logging.WARNING, "dmd2.fast"):
        assert np.array_equal(pixels(tight), expected)
    assert tight.unet.way == "plain"
    (record,) = caplog.records
    assert "way keeps for a step is dropped for good: it left too little" in record.getMessage()


def test_an_image_that_it_spoilt_is_made_again_though_memory_is_short(
    tight: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = pixels(tight)
    (sample,) = stepped(tight, new(tight))
    sample.trajectory.latents = torch.full_like(sample.trajectory.latents, torch.nan)
    (picture,) = tight.decode([sample])
    monkeypatch.setattr(tight.unet, "plain", fits_without(tight, tight.unet.plain))
    with caplog.at_level(logging.WARNING, "dmd2.fast"):
        assert np.array_equal(picture.pixels(), expected)
    assert sample.ways == {"step": ["plain"], "decode": ["plain"]}
    assert ["left too little memory" in record.getMessage() for record in caplog.records] == [True]


def test_a_batch_that_is_too_large_costs_no_way(
    tight: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = tight.unet_call

    def for_one(samples: list[Sample]) -> Any:
        if len(samples) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(samples)

    monkeypatch.setattr(tight, "unet_call", for_one)
    with pytest.raises(DeviceMemoryError):
        tight.step(new(tight, 2))
    tight.step(new(tight))
    assert tight.unet.way == "keeps"


def test_what_never_fits_is_tried_with_it_and_without_and_then_an_error(
    tight: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def no_memory(*args: Any, **kwargs: Any) -> Any:
        tried.append(tight.unet.way)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tight.vae.plain, "decode", no_memory)
    samples = stepped(tight, new(tight))
    for _ in range(2):
        with pytest.raises(DeviceMemoryError, match="Ask for a smaller"):
            tight.decode(samples)
    assert tried == ["keeps", "plain", "plain"]


@pytest.mark.parametrize("max_batch", [None, 2])
def test_setup_serves_without_it_where_a_decode_would_not_fit(
    max_batch: int | None, tight: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was chosen after a decode was tried, without what it keeps."""
    tight.unet.drop("is to be chosen")
    monkeypatch.setattr(tuning, "_FASTER", 1e9)
    monkeypatch.setattr(tuning, "_CLEARLY_FASTER", 1e9)
    monkeypatch.setattr(Pipeline, "warms_up", True)
    adopted = []
    adopt = tight.unet.adopt
    monkeypatch.setattr(
        tight.unet, "adopt", lambda way, model: (adopted.append(way.name), adopt(way, model))
    )
    guarded = fits_without(tight, tight.vae.plain.decode)
    monkeypatch.setattr(tight.vae.plain, "decode", guarded)
    monkeypatch.setattr(batch_limits, "choose_ways", partial(choose_ways, ways=[KEEPS]))
    limits = batch_limits.warm_up(tight, max_batch, Tuning(), Budget(60))
    assert (adopted, tight.unet.way) == (["keeps"], "plain")
    assert limits(Lane(64, 64, guided=False), STEP) >= 1


@pytest.mark.parametrize("num_images", [1, 2])
def test_weights_with_loras_go_before_a_way_does(
    num_images: int, tight: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are merged again when they are asked for; and a batch gets the memory too."""
    sets = tight.weight_sets._merged

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if sets:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return decode(*args, **kwargs)

    decode = tight.vae.plain.decode
    samples = stepped(tight, new(tight, num_images))
    monkeypatch.setattr(tight.vae.plain, "decode", guarded)
    sets["unet", (("sha256", 1.0),)] = {"weight": torch.zeros(2)}
    assert len(tight.decode(samples)) == num_images
    assert tight.unet.way == "keeps"
    assert not sets


def test_they_go_before_a_way_that_finds_no_memory_beside_them(
    own_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is a batch of plain images halved for good by a LoRA that somebody else asked for."""
    sets, plain = own_pipeline.weight_sets._merged, own_pipeline.unet.plain

    def beside_nothing(*args: Any, **kwargs: Any) -> Any:
        if sets:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return plain(*args, **kwargs)

    own_pipeline.unet.adopt(replace(KEEPS, keeps_memory=False), beside_nothing)
    samples = new(own_pipeline, 2)
    sets["unet", (("sha256", 1.0),)] = {"weight": torch.zeros(2)}
    own_pipeline.step(samples)
    assert own_pipeline.unet.way == "keeps"
    assert [sample.ways["step"] for sample in samples] == [["keeps"]] * 2
    assert (len(sets), caplog.records) == (0, [])


def test_they_go_before_a_prompt_is_an_error(
    tight: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = tight._text_encoder._embed

    def beside_nothing(prompts: list[str]) -> Any:
        if tight.weight_sets._merged:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return embed(prompts)

    monkeypatch.setattr(tight._text_encoder, "_embed", beside_nothing)
    tight.weight_sets._merged["unet", (("sha256", 1.0),)] = {"weight": torch.zeros(2)}
    assert len(new(tight)) == 1
    assert tight.unet.way == "keeps"


def test_graphs_are_what_keeps_memory() -> None:
    assert [way.name for way in WAYS if way.keeps_memory] == ["graph"]
