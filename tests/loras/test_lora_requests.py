"""Images of requests with LoRAs equal stock diffusers', and leave the model as it was."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparing import fingerprint
from drawn_loras import low_rank
from model_folders import pixels_of
from safetensors.torch import save_file
from with_loras import pictures, request, stock_picture
from wrapped_models import Broken

from dmd2.engine.engine import Engine
from dmd2.engine.job import GenerationResult, Job, JobImage
from dmd2.engine.units import STEP, merge_cost
from dmd2.errors import GenerationError, InvalidRequestError
from dmd2.fast.tuning import Tuning
from dmd2.loras.formats import read_lora
from dmd2.loras.names import MODEL_PARTS, ModuleNames
from dmd2.request.lora_rules import LoraUse
from dmd2.sampling.pipeline import Pipeline

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@pytest.fixture(scope="module")
def lora_files(weights: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kohya's files: one for all parts, one for the UNet alone, one for the text encoders."""
    folder = tmp_path_factory.mktemp("loras")
    files = {"all": MODEL_PARTS, "unet": ("unet",), "text": ("text_encoder", "text_encoder_2")}
    return {
        name: _write(folder / f"{name}.safetensors", weights, parts, seed)
        for seed, (name, parts) in enumerate(files.items())
    }


def _write(path: Path, weights: Any, parts: tuple[str, ...], seed: int) -> Path:
    wanted = ("attn", "self_attn", "conv1")
    shapes = {
        PREFIXES[part] + name.removesuffix(".weight").replace(".", "_"): tensor.shape
        for part in parts
        for name, tensor in weights[part].items()
        if name.endswith(".weight") and tensor.ndim > 1 and any(word in name for word in wanted)
    }
    save_file(low_rank(shapes, rank=3, alpha=2.0, seed=seed), path)
    return path


@pytest.fixture(scope="module")
def use(lora_files: dict[str, Path], names: ModuleNames) -> Callable[..., LoraUse]:
    def make(name: str, scale: float = 1.0) -> LoraUse:
        return LoraUse(name, f"sha256 of {name}", scale, read_lora(lora_files[name], names).deltas)

    return make


@pytest.fixture(scope="module")
def forced(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with every way that can be built, which holds one set of the UNet's at a time."""
    pipeline = Pipeline.load(model_folder, "cpu", "float32")
    pipeline.weight_sets.max_bytes = 1
    engine = Engine(pipeline, tmp_path_factory.mktemp("outputs"))
    engine.warm_up(4, Tuning("force"))
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("scales", "how"),
    [
        ({"all": 0.8}, "set_adapters"),
        ({"unet": -1.0}, "set_adapters"),
        ({"text": 3.0}, "set_adapters"),
        ({"all": 0.7, "unet": 3.0}, "set_adapters"),
        ({"all": 0.8}, "fuse_lora"),
    ],
    ids=str,
)
def test_equals_stock(
    how: str,
    scales: dict[str, float],
    forced: Engine,
    use: Callable[..., LoraUse],
    lora_files: dict[str, Path],
    stock: Callable[[], Any],
) -> None:
    asked = request(forced, *(use(name, scale) for name, scale in scales.items()))
    expected = stock_picture(
        stock(), asked, {lora_files[name]: scale for name, scale in scales.items()}, how
    )
    (found,) = pictures(forced, asked)
    (without,) = pictures(forced, request(forced))
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - without).max() > 5, "a LoRA without effect would hide any difference"


def test_equals_stock_among_others(
    forced: Engine,
    use: Callable[..., LoraUse],
    lora_files: dict[str, Path],
    stock: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In calls that it shares with another of its LoRAs, in turns with those of plain requests."""
    step, all_are_there, calls = forced._pipeline.step, threading.Event(), []

    def noted(samples: Any) -> None:
        assert all_are_there.wait(20)
        calls.append(len(samples))
        step(samples)

    monkeypatch.setattr(forced._pipeline, "step", noted)
    lora, other = use("all", 0.8), {"prompt": "a blue star at night", "seed": 11}
    plain, asked = request(forced), request(forced, lora)
    company = [request(forced, lora, **other), request(forced, **other, num_outputs=2)]
    futures = [forced.submit(each) for each in (plain, asked, *company)]
    all_are_there.set()
    results = [future.result() for future in futures]
    assert [max(result.batch_sizes) for result in results] == [3, 2, 2, 3]
    assert sum(one != next_one for one, next_one in pairwise(calls)) > 2, "they take turns"
    pipe, (plainly, found) = stock(), [pixels_of(result.paths[0]) for result in results[:2]]
    assert np.abs(plainly - stock_picture(pipe, plain, {})).max() <= 1
    assert np.abs(found - stock_picture(pipe, asked, {lora_files["all"]: 0.8})).max() <= 1


def test_served_weights_stay_bit_for_bit(
    model_folder: Path, tmp_path: Path, use: Callable[..., LoraUse]
) -> None:
    """After requests that were done, that failed, and that were given up."""
    pipeline = Pipeline.load(model_folder, "cpu", "float32")
    models = (pipeline.unet.plain, *pipeline._text_encoder._encoders)
    engine = Engine(pipeline, tmp_path)
    engine.submit(request(engine)).result()  # transformers notes that a model was called
    before = [fingerprint(model) for model in models]
    engine.submit(request(engine, use("all"))).result()
    broken = LoraUse("broken", "x", 1.0, {"unet": {"no.such.weight": None}})
    with pytest.raises(Exception, match=r"no\.such\.weight"):
        engine.submit(request(engine, broken)).result()
    engine.submit(request(engine, use("unet", 2.0), num_outputs=4))
    engine.close()
    assert [fingerprint(model) for model in models] == before


def test_served_weights_stay_bit_for_bit_when_a_step_is_cancelled(
    own_pipeline: Pipeline,
    tmp_path: Path,
    use: Callable[..., LoraUse],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the LoRA's weights are in the place of the model's; the engine goes on serving."""
    engine, unet = Engine(own_pipeline, tmp_path), own_pipeline.unet
    models = (unet.plain, *own_pipeline._text_encoder._encoders)
    expected = pictures(engine, request(engine))
    before = [fingerprint(model) for model in models]
    reached, go = threading.Event(), threading.Event()

    def hold(noise_pred: Any) -> Any:
        reached.set()
        assert go.wait(20)
        return noise_pred

    monkeypatch.setattr(unet, "plain", Broken(unet.plain, hold, at=1))

    async def cancel_in_the_second_step() -> GenerationResult:
        unwanted = asyncio.create_task(engine.generate(request(engine, use("all"))))
        assert await asyncio.to_thread(reached.wait, 20)
        assert [fingerprint(model) for model in models] != before, "the LoRA is in its place"
        wanted = asyncio.create_task(engine.generate(request(engine)))
        await asyncio.sleep(0)  # it is on its way
        unwanted.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unwanted
        go.set()
        return await wanted

    result = asyncio.run(cancel_in_the_second_step())
    assert [fingerprint(model) for model in models] == before
    assert np.array_equal(expected, [pixels_of(path) for path in result.paths])
    engine.submit(request(engine, use("all"))).result()
    assert [fingerprint(model) for model in models] == before
    engine.close()


def test_a_sum_beyond_the_dtype_is_refused_and_harms_nobody(
    model_folder: Path, tmp_path: Path, use: Callable[..., LoraUse]
) -> None:
    engine = Engine(Pipeline.load(model_folder, "cpu", "float16"), tmp_path)
    before = pictures(engine, request(engine))
    huge = use("unet", 3.0)
    for delta in huge.deltas["unet"].values():
        delta.parts["up"].mul_(1e6)
    for field, loras in (
        ("lora_weights", (huge,)),
        ("lora_weights", (huge, use("all"))),
        ("extra_lora", (use("all"), huge)),
    ):
        with pytest.raises(InvalidRequestError, match=r"unet at 3.*float16 can hold") as caught:
            engine.submit(request(engine, *loras)).result()
        assert caught.value.field == field
    assert np.array_equal(before, pictures(engine, request(engine)))
    engine.close()


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ((), r"with unet at 3 added .*Lower lora_scale, or"),
        (("text",), r"unet at 3 and text at 1 .*Lower lora_scale or extra_lora_scale, or"),
    ],
)
def test_what_is_not_finite_names_the_loras(
    others: tuple[str, ...],
    said: str,
    own_pipeline: Pipeline,
    tmp_path: Path,
    use: Callable[..., LoraUse],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, plain = Engine(own_pipeline, tmp_path), own_pipeline.unet.plain
    monkeypatch.setattr(own_pipeline.unet, "plain", Broken(plain, lambda noise: noise / 0, at=3))
    loras = (use("unet", 3.0), *map(use, others))
    with pytest.raises(GenerationError, match=f"latents that are not finite.*{said}"):
        engine.submit(request(engine, *loras)).result()
    with pytest.raises(GenerationError, match=r"not finite: NaN or infinity$"):
        engine.submit(request(engine)).result()
    engine.close()


def test_a_lane_is_charged_for_what_is_merged_for_it(
    own_pipeline: Pipeline, use: Callable[..., LoraUse]
) -> None:
    def cost(image: JobImage) -> float:
        return merge_cost(own_pipeline, [image])

    plain, text, unet, whole = (
        JobImage(Job(request(own_pipeline, *loras)), 0)
        for loras in ((), [use("text")], [use("unet")], [use("all")])
    )
    step = STEP.cost(plain.job.lane)
    assert 0 == cost(plain) < cost(text) < cost(whole)
    assert cost(whole) == pytest.approx(cost(text) + cost(unet))
    assert cost(unet) < 2 * step, "it leaves some weights as they are"
    for image in (text, whole):
        STEP.run(own_pipeline, [image])
        assert cost(image) == 0
    own_pipeline.weight_sets.let_go()
    assert cost(text) == 0, "its prompt is embedded"
    assert cost(whole) == pytest.approx(cost(unet))


def test_the_same_prompt_is_embedded_anew_for_other_text_loras(
    forced: Engine, use: Callable[..., LoraUse]
) -> None:
    """Else an image would be of another LoRA's text, without any error."""
    seen = [
        pictures(forced, request(forced, *loras))[0]
        for loras in ([], [use("text")], [use("text", 2.0)], [use("unet")], [])
    ]
    differences = [np.abs(a - b).max() for a, b in pairwise(seen)]
    assert min(differences) > 5
    assert np.array_equal(seen[0], seen[-1])


def test_random_requests_equal_their_solo_twins(
    forced: Engine, use: Callable[..., LoraUse], pytestconfig: pytest.Config
) -> None:
    """Over LoRA sets, guidance, sizes and outputs, all under way at once."""
    rng = random.Random(1)
    sets = [(), (), (use("all", 0.5),), (use("unet"),), (use("text"), use("unet", -0.5))]
    asked = [
        request(
            forced,
            *rng.choice(sets),
            prompt=rng.choice(["a red circle", "a blue star at night"]),
            seed=rng.randrange(100),
            num_outputs=rng.choice([1, 1, 2]),
            guidance_scale=rng.choice([0.0, 0.0, 3.0]),
            aspect_ratio=rng.choice(["1:1", "16:9"]),
        )
        for _ in range(500 if pytestconfig.getoption("--full") else 12)
    ]
    together = [forced.submit(each) for each in asked]
    results = [future.result() for future in together]
    for each, result in zip(asked, results, strict=True):
        expected = [pixels_of(path) for path in result.paths]
        for alone, found in zip(pictures(forced, each), expected, strict=True):
            assert np.abs(alone - found).max() <= 1
    plain = [r.ways["step"] for r in results if not r.request.loras]
    with_loras = [r.ways["step"] for r in results if r.request.loras]
    assert set(plain) == {"lean"}
    assert set(with_loras) == {"plain"}
