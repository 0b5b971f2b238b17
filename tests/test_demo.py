"""The demo's three models: whole, small, on every path of the container, and true to the prompt."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folders import StockDiffusers, pixels_of
from numpy.typing import NDArray
from PIL import Image
from results_tables import percent, read_tables

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
from training.demo.evaluation import SEED
from training.demo.judge import Judge, Reading, label_of, load_judge, score
from training.demo.scenes import Described, sample

DEMO = ROOT / "weights" / "demo"
MODELS = {"demo": 4, "demo-1step": 1, "demo-lora": 4}
# Their names in RESULTS.md.
STUDENTS = {"demo": "student 4step", "demo-1step": "student 1step", "demo-lora": "student lora"}
PROMPT = "a fox in the snow"
# Of the held-out captions that training/RESULTS.md has its shares of, with the same seeds.
NUM_CAPTIONS = 32
NUM_AMONG_OTHER_WORDS = 16
# How often a model as good as RESULTS.md says would fail one of these tests, were there luck in it.
CHANCE = 1e-4


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


def held_out(num: int) -> list[Described]:
    """The first that RESULTS.md's table of one thing is about."""
    return [sample(SEED, index, held_out=True, num_objects=1) for index in range(num)]


def painted(demo: Demo, prompts: Sequence[str]) -> NDArray[np.uint8]:
    """A picture of each prompt, number i from seed i, uint8 [N, 128, 128, 3]."""
    requests = [
        GenerationRequest.resolve(demo.engine.card, prompt=prompt, seed=seed)
        for seed, prompt in enumerate(prompts)
    ]
    results = [job.result(timeout=60) for job in [demo.engine.submit(r) for r in requests]]
    return np.stack([pixels_of(result.paths[0]) for result in results]).astype(np.uint8)


def num_right(judge: Judge, pictures: NDArray[np.uint8], asked: Sequence[Described]) -> int:
    """How many show what was asked for, on its background, and nothing else."""
    readings = zip(judge.read(pictures), asked, strict=True)
    return sum(score(reading, described.scene)["all"] for reading, described in readings)


def fewest(demo: Demo, num: int) -> int:
    """Of so many pictures: fewer are right with less than CHANCE, by RESULTS.md's share."""
    share = percent(read_tables()["One thing"][STUDENTS[demo.name]]["all"]) / 100
    chance, right = 0.0, -1
    while chance < CHANCE:
        right += 1
        chance += math.comb(num, right) * share**right * (1 - share) ** (num - right)
    return right


def test_the_pictures_show_what_the_prompts_ask_for(demo: Demo, judge: Judge) -> None:
    card = demo.engine.card
    assert (card.name, card.default_steps) == (demo.name, MODELS[demo.name])
    asked = held_out(NUM_CAPTIONS)
    pictures = painted(demo, [described.caption for described in asked])
    assert num_right(judge, pictures, asked) >= fewest(demo, len(asked))
    assert num_right(judge, pictures, asked[1:] + asked[:1]) == 0


def test_unknown_words_are_harmless(demo: Demo, judge: Judge) -> None:
    asked = held_out(NUM_AMONG_OTHER_WORDS)
    prompts = [f"a breathtaking hyperrealism of {each.caption}, octane, 8k" for each in asked]
    assert num_right(judge, painted(demo, prompts), asked) >= fewest(demo, len(asked))


def test_anything_else_in_a_picture_counts_against_it(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    (described,) = held_out(1)
    (thing,) = described.scene.objects
    background, pictures = described.scene.background, np.zeros((1, 128, 128, 3), np.uint8)
    for labels, right in (((label_of(thing),), 1), ((label_of(thing), "other"), 0)):
        reading = Reading(labels, background, "small", "left")
        monkeypatch.setattr(judge, "read", lambda _, reading=reading: [reading])
        assert num_right(judge, pictures, [described]) == right


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


def test_it_is_as_small_as_is_said_and_says_that_it_is_free() -> None:
    sizes = {path: path.stat().st_size for path in DEMO.rglob("*") if path.is_file()}
    weights = sum(size for path, size in sizes.items() if path.suffix == ".safetensors")
    assert weights <= 60_000_000
    said = f"takes {sum(sizes.values()) / 1e6:.1f} MB: {weights / 1e6:.1f} MB of weights"
    assert said in (ROOT / "docs" / "method.md").read_text()
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
