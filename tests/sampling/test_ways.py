"""Every way that there is, broken in every manner, on a real model: the pictures stay plain's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from model_folders import StockDiffusers, pixels_of
from wrapped_models import Broken

from dmd2.engine.engine import Engine
from dmd2.engine.job import GenerationResult
from dmd2.errors import DeviceMemoryError, GenerationError
from dmd2.fast import tuning
from dmd2.fast.budget import Budget
from dmd2.fast.group_norm import SplitGroupNorm
from dmd2.fast.runner import Runner
from dmd2.fast.tuning import Tuning
from dmd2.fast.ways import WAYS, Facts, Way
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways

LEAN = {way.part: way for way in WAYS if way.name == "lean"}
ON_A_CPU = Facts(torch.device("cpu"), torch.float32, compile=True)
SUITING = [way for way in WAYS if way.suits(ON_A_CPU) is None]
each_way = pytest.mark.parametrize("way", SUITING, ids=lambda way: f"{way.name} {way.part}")
PLAINLY = {"step": "plain", "decode": "plain"}


def raise_it(output: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("a kernel broke")


def no_memory(output: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def not_finite(output: torch.Tensor) -> torch.Tensor:
    spoilt = output.clone()
    spoilt[..., 0, 0] = torch.nan
    return spoilt


def wrong(output: torch.Tensor) -> torch.Tensor:
    return output * (1 + 2e-5)


def broken_way(way: Way, broken: Callable[[torch.Tensor], torch.Tensor], at: int) -> Way:
    """A way whose model breaks at a call; of a compiled one nothing is compiled for that."""
    build = (lambda plain: plain) if way.compiles else way.build
    return replace(way, build=lambda plain: Broken(build(plain), broken, at))


@pytest.fixture
def plain_engine(own_pipeline: Pipeline, tmp_path: Path) -> Iterator[Engine]:
    """An engine without ways, but for those that a test gives its pipeline."""
    engine = Engine(own_pipeline, tmp_path / "outputs")
    yield engine
    engine.close()


@pytest.fixture
def any_speed_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a way returns decides: on so small a model few are faster than plain."""
    monkeypatch.setattr(tuning, "_FASTER", 1e9)
    monkeypatch.setattr(tuning, "_CLEARLY_FASTER", 1e9)


@pytest.fixture(scope="module")
def plain_pixels(pipeline: Pipeline, tmp_path_factory: Any) -> dict[int, Any]:
    """Of the images that two seeds make without ways."""
    engine = Engine(pipeline, tmp_path_factory.mktemp("plain"))
    found = {seed: pixels(made(engine, seed=seed)) for seed in (7, 8)}
    engine.close()
    return found


def made(engine: Engine, **inputs: Any) -> GenerationResult:
    """An image in two steps."""
    usual = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 2}
    request = GenerationRequest.resolve(engine.card, **usual | inputs)
    return engine.submit(request).result(timeout=30)


def pixels(result: GenerationResult) -> Any:
    return pixels_of(result.paths[0])


def assert_plain(engine: Engine, expected: Any) -> None:
    """That no way has a part in seed 7's image, and its pixels are plain's."""
    result = made(engine)
    assert result.ways == PLAINLY
    assert np.array_equal(pixels(result), expected)


def choose(pipeline: Pipeline, asked: Tuning, *ways: Way) -> None:
    request = GenerationRequest.resolve(pipeline.card, prompt="warm up", seed=0)
    choose_ways(pipeline, request, asked, Budget(60), ways)


def runner_of(pipeline: Pipeline, way: Way) -> Runner:
    return {"step": pipeline.unet, "decode": pipeline.vae}[way.part]


@each_way
@pytest.mark.parametrize(
    ("broken", "at"), [(raise_it, 0), (no_memory, 1), (not_finite, 1), (wrong, 1)]
)
def test_what_breaks_at_setup_is_never_used(
    way: Way,
    broken: Callable[[torch.Tensor], torch.Tensor],
    at: int,
    plain_engine: Engine,
    own_pipeline: Pipeline,
    plain_pixels: dict[int, Any],
    any_speed_will_do: None,
) -> None:
    choose(own_pipeline, Tuning("quick", compile=True), broken_way(way, broken, at))
    assert runner_of(own_pipeline, way).way == "plain"
    assert_plain(plain_engine, plain_pixels[7])


@each_way
def test_what_works_at_setup_is_used(
    way: Way, plain_engine: Engine, own_pipeline: Pipeline, any_speed_will_do: None
) -> None:
    """Without which the tests of what does not would say nothing."""
    choose(own_pipeline, Tuning("quick", compile=True), broken_way(way, lambda output: output, 0))
    assert made(plain_engine).ways == PLAINLY | {way.part: way.name}


@pytest.mark.parametrize("broken", [raise_it, no_memory, not_finite, wrong])
def test_a_step_that_breaks_for_two_images_alone_is_never_used(
    broken: Callable[[torch.Tensor], torch.Tensor],
    plain_engine: Engine,
    own_pipeline: Pipeline,
    plain_pixels: dict[int, Any],
    any_speed_will_do: None,
) -> None:
    def for_two(output: torch.Tensor) -> torch.Tensor:
        return broken(output) if len(output) == 2 else output

    choose(own_pipeline, Tuning("quick"), broken_way(LEAN["step"], for_two, 0))
    assert own_pipeline.unet.way == "plain"
    assert_plain(plain_engine, plain_pixels[7])


@each_way
def test_what_cannot_be_built_is_never_used(
    way: Way, plain_engine: Engine, own_pipeline: Pipeline, plain_pixels: dict[int, Any]
) -> None:
    def build(plain: Any) -> Any:
        raise ValueError("an attention is not a VAE's")

    for mode in ("quick", "force"):
        choose(own_pipeline, Tuning(mode, compile=True), replace(way, build=build))
    assert_plain(plain_engine, plain_pixels[7])


@each_way
@pytest.mark.parametrize("broken", [raise_it, no_memory, not_finite])
@pytest.mark.parametrize("at", [0, 1])
def test_what_breaks_later_is_dropped_for_good_and_the_request_is_served(
    way: Way,
    broken: Callable[[torch.Tensor], torch.Tensor],
    at: int,
    plain_engine: Engine,
    own_pipeline: Pipeline,
    plain_pixels: dict[int, Any],
) -> None:
    spoilt, runner = broken_way(way, broken, at), runner_of(own_pipeline, way)
    runner.adopt(spoilt, spoilt.build(runner.plain))
    results = {seed: made(plain_engine, seed=seed) for seed in plain_pixels}
    assert runner.way == "plain"
    for seed, result in results.items():
        assert np.abs(pixels(result) - plain_pixels[seed]).max() <= 1
        if result.ways == PLAINLY:
            assert np.array_equal(pixels(result), plain_pixels[seed])
    assert results[8].ways == PLAINLY
    first = "plain"
    if at == 1 and way.part == "decode":
        first = way.name
    elif at == 1 and broken is not not_finite:  # else both steps were taken again
        first = f"{way.name}, plain"
    assert results[7].ways[way.part] == first


@pytest.mark.parametrize("part", LEAN)
def test_what_plain_cannot_do_either_is_not_held_against_a_way(
    part: Any, plain_engine: Engine, own_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(own_pipeline, Tuning("force"), LEAN[part])
    runner = runner_of(own_pipeline, LEAN[part])
    with monkeypatch.context() as patch:
        for model in ("_model", "plain"):
            patch.setattr(runner, model, Broken(getattr(runner, model), no_memory, 0))
        with pytest.raises(DeviceMemoryError, match="Ask for a smaller"):
            made(plain_engine)
    assert made(plain_engine).ways[part] == "lean"


def test_latents_that_plain_spoils_too_are_an_error_and_no_fault_of_the_way(
    plain_engine: Engine, own_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(own_pipeline, Tuning("force"), *LEAN.values())
    with monkeypatch.context() as patch:
        for model in ("_model", "plain"):
            broken = Broken(getattr(own_pipeline.unet, model), not_finite, 0)
            patch.setattr(own_pipeline.unet, model, broken)
        with pytest.raises(GenerationError, match="UNet returned latents that are not finite"):
            made(plain_engine)
    assert made(plain_engine).ways == {"step": "lean", "decode": "lean"}


def test_a_decode_that_overflows_in_plain_too_is_done_in_float32_and_the_way_is_kept(
    new_pipeline: Callable[..., Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = new_pipeline("float16")
    engine, decode, decodes = Engine(pipeline, tmp_path), AutoencoderKL.decode, []
    expected = pixels(made(engine))
    choose(pipeline, Tuning("force"), LEAN["decode"])

    def overflowing(vae: Any, latents: torch.Tensor, **more: Any) -> tuple[torch.Tensor]:
        (images,) = decode(vae, latents, **more)
        is_lean = isinstance(vae.decoder.conv_norm_out, SplitGroupNorm)
        decodes.append((images.dtype, is_lean))
        return (not_finite(images) if images.dtype == torch.float16 else images,)

    monkeypatch.setattr(AutoencoderKL, "decode", overflowing)
    result = made(engine)
    engine.close()
    assert decodes == [(torch.float16, True), (torch.float16, False), (torch.float32, False)]
    assert (result.ways["decode"], pipeline.vae.way) == ("plain", "lean")
    assert np.abs(pixels(result) - expected).max() <= 2


def test_all_ways_make_stock_diffusers_pictures(
    stock: StockDiffusers, plain_engine: Engine, own_pipeline: Pipeline
) -> None:
    choose(own_pipeline, Tuning("force"), *LEAN.values())
    result = made(plain_engine, num_outputs=2, width=72, height=104, guidance_scale=3)
    assert result.ways == {"step": "lean", "decode": "lean"}
    for index, path in enumerate(result.paths):
        assert np.abs(pixels_of(path) - stock.image(result.request, index)).max() <= 1
