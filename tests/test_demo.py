"""The demo's three models: whole, small, on every path of the container, and true to the prompt."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folders import StockDiffusers, pixels_of
from numpy.typing import NDArray
from PIL import Image

from dmd2.engine import report
from dmd2.engine.engine import Engine
from dmd2.engine.job import GenerationResult
from dmd2.engine.opening import open_engine
from dmd2.errors import InvalidRequestError
from dmd2.loras.fetching import LoraFetcher
from dmd2.loras.library import LoraLibrary
from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraInputs
from dmd2.settings import ROOT, Settings
from dmd2.store.install import install
from dmd2.store.manifest import Manifest, verify
from training.demo.bundle import JUDGE
from training.demo.judge import Judge, load_judge

DEMO = ROOT / "weights" / "demo"
MODELS = {"demo": 4, "demo-1step": 1, "demo-lora": 4}
PROMPT = "a fox in the snow"
# At 16 seeds the models draw a fox in the snow that the classifier finds 15, 12 and 15 times.
SEED = 200
# What a newcomer might type, and what must be in the picture.
ASKED = {
    PROMPT: ("fox", "snow"),
    "a red circle on a blue background": ("red circle", "blue"),
    "a rocket in space": ("rocket", "night"),
    "a sailboat on the sea": ("sailboat", "sea"),
    "a cactus in the desert": ("cactus", "desert"),
    "a strawberry on a white background": ("strawberry", "white"),
    "a cow on a meadow": ("cow", "meadow"),
    "a robot on a yellow background": ("robot", "yellow"),
}


@dataclass(frozen=True)
class Demo:
    """One of the three: its name, its folder, and an engine on it."""

    name: str
    folder: Path
    engine: Engine

    def pictures(self, **inputs: Any) -> list[NDArray[np.int16]]:
        """What it makes of a request."""
        request = GenerationRequest.resolve(self.engine.card, **inputs)
        return [pixels_of(path) for path in self.engine.submit(request).result(timeout=60).paths]


@pytest.fixture(scope="module", params=MODELS)
def demo(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Demo]:
    """An engine on each of the three, which opening makes by itself and without a download.

    A server opens it likewise: that of scripts/predict does in tests/test_scripts.py.
    """
    folder, outputs = (tmp_path_factory.mktemp(name) for name in ("weights", "outputs"))
    engine = open_engine(
        Settings(
            model=request.param,
            weights_dir=folder,
            output_dir=outputs,
            device="cpu",
            max_batch=4,
            tune="off",
        )
    )
    yield Demo(request.param, folder / request.param, engine)
    engine.close()


@pytest.fixture(scope="module")
def judge() -> Judge:
    """The classifier that read the pictures of training/RESULTS.md."""
    return load_judge(JUDGE)


def num_right(
    judge: Judge, pictures: Sequence[NDArray[np.int16]], thing: str, background: str
) -> int:
    """How many show a thing on its background."""
    readings = judge.read(np.stack(pictures).astype(np.uint8))
    return sum(thing in r.labels and r.background == background for r in readings)


def test_the_pictures_show_what_the_prompts_ask_for(demo: Demo, judge: Judge) -> None:
    card = demo.engine.card
    assert (card.name, card.default_steps) == (demo.name, MODELS[demo.name])
    right = {
        prompt: num_right(judge, demo.pictures(prompt=prompt, seed=SEED, num_outputs=4), *asked)
        for prompt, asked in ASKED.items()
    }
    assert right[PROMPT] >= 3
    assert sum(right.values()) >= 27, right  # of 32; the three models reach 30, 31 and 30
    (other,) = demo.pictures(prompt="a panda in the snow", seed=SEED)
    assert num_right(judge, [other], *ASKED[PROMPT]) == 0


def test_unknown_words_are_harmless(demo: Demo, judge: Judge) -> None:
    prompt = f"a breathtaking hyperrealism of {PROMPT}, octane, 8k"
    pictures = demo.pictures(prompt=prompt, seed=SEED, num_outputs=4)
    assert num_right(judge, pictures, *ASKED[PROMPT]) >= 3


def test_a_demo_model_is_whole_and_equals_stock_diffusers(demo: Demo) -> None:
    assert verify(Manifest.read().models[demo.name], demo.folder) == []
    inputs = {"prompt": PROMPT, "seed": 3, "num_outputs": 2}
    request = GenerationRequest.resolve(demo.engine.card, **inputs)
    stock = StockDiffusers(demo.folder)
    for index, picture in enumerate(demo.pictures(**inputs)):
        assert np.abs(picture - stock.image(request, index)).max() <= 1


@pytest.mark.parametrize("demo", ["demo"], indirect=True)
def test_the_hedgehog_of_the_readme_is_drawn(demo: Demo, judge: Judge) -> None:
    """Something large in the snow, where the model without the LoRA has no shape for the word.

    That it is nearest to a drawing of one, training/RESULTS.md says; the drawings are not here.
    """
    fetcher = LoraFetcher(Settings("demo", lora_sources=("local",), lora_dir=DEMO / "loras"))
    library = LoraLibrary(fetcher, demo.engine.lora_names)
    inputs = {"prompt": "a hedgehog in the snow", "seed": SEED, "num_outputs": 2}
    request = GenerationRequest.resolve(demo.engine.card, **inputs)

    async def with_lora() -> GenerationResult:
        async with library.using(LoraInputs("hedgehog.safetensors")) as loras:
            return await demo.engine.generate(replace(request, loras=loras))

    result = asyncio.run(with_lora())
    sha256 = hashlib.sha256((DEMO / "loras" / "hedgehog.safetensors").read_bytes()).hexdigest()
    named = {"name": "hedgehog", "sha256": sha256, "scale": 1.0}
    assert report.of_end(result).metrics["loras"] == [named]
    with Image.open(result.paths[0]) as image:
        assert f'Lora hashes: "hedgehog: {sha256[:10]}"' in image.info["parameters"]
    found, without = [pixels_of(path) for path in result.paths], demo.pictures(**inputs)
    with_it, without_it = (judge.read(np.stack(p).astype(np.uint8)) for p in (found, without))
    assert {reading.background for reading in (*with_it, *without_it)} == {"snow"}
    assert {reading.size for reading in with_it} == {"large"}
    assert "large" not in {reading.size for reading in without_it}


def test_taesdxl_does_not_fit_its_latents(demo: Demo) -> None:
    with pytest.raises(InvalidRequestError, match="has no fast decoder"):
        demo.pictures(prompt=PROMPT, fast_decode=True)


def test_it_is_small_and_says_that_it_is_free() -> None:
    weights = sum(path.stat().st_size for path in DEMO.rglob("*.safetensors"))
    assert weights <= 60_000_000
    assert "Copyright (c) Microsoft" in (DEMO / "LICENSE").read_text()


def test_a_lora_scale_is_obeyed(tmp_path: Path) -> None:
    full = install("demo-lora", tmp_path / "full", say=lambda _: None)
    half = install("demo-lora", tmp_path / "half", lora_scale=0.5, say=lambda _: None)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (full / name).read_bytes() != (half / name).read_bytes()


def test_a_model_that_an_older_repository_made_is_made_anew(tmp_path: Path) -> None:
    now = Manifest.read()
    model = now.models["demo-1step"]
    assert model.card is not None
    older = replace(model, card={**model.card, "safety_checker": "another"})
    said: list[str] = []
    for entry in (older, model, model):
        install(model.name, tmp_path, manifest=Manifest({model.name: entry}, {}), say=said.append)
    assert [line.split(" in ")[0] for line in said if "installed" in line] == [
        "installed demo-1step",
        "installed demo-1step",
        "demo-1step is installed",
    ]
    assert verify(model, tmp_path / model.name) == []
    assert ModelCard.read(tmp_path / model.name).safety_checker is None
