"""The demo's three models: whole, small, on every path of the container, and true to the prompt."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cog_server import CogServer
from model_folders import StockDiffusers, pixels_of
from PIL import Image
from servers import start

from dmd2.engine.engine import Engine
from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.settings import ROOT
from dmd2.store.install import install
from dmd2.store.manifest import Manifest, verify

DEMO = ROOT / "weights" / "demo"
MODELS = {"demo": 4, "demo-1step": 1, "demo-lora": 4}
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module", params=MODELS)
def demo_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CogServer]:
    """Cog's server on each of the three, which setup makes by itself and without a download."""
    folder = tmp_path_factory.mktemp("weights")
    outputs = tmp_path_factory.mktemp("outputs")
    environment = {"DMD2_WEIGHTS_DIR": str(folder), "DMD2_OUTPUT_DIR": str(outputs)}
    environment["DMD2_MAX_BATCH"] = "4"  # how many pay is measured by other tests' servers
    with start(request.param, **environment) as server:
        health = server.wait_until_set_up(120)
        assert health["status"] == "READY", health
        server.model = request.param
        yield server


def pictures(answer: dict) -> list[np.ndarray]:
    assert answer["status"] == "succeeded", answer
    pictures = []
    for uri in answer["output"]:
        with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
            pictures.append(np.asarray(image.convert("RGB"), np.float32))
    return pictures


def is_red_circle_on_blue(picture: np.ndarray) -> bool:
    """Blue at the edge; and what is red is as much of its own box as of a square a circle is."""
    red, green, blue = picture[[0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=0)
    is_red = (picture[..., 0] > 150) & (picture[..., 2] < 110)
    rows, columns = np.nonzero(is_red)
    if len(rows) < 200 or blue < 1.5 * max(red, green):
        return False
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    fill = len(rows) / (height * width)
    return abs(fill - np.pi / 4) < 0.08 and abs(height / width - 1) < 0.15


def test_the_picture_shows_what_the_prompt_asks_for(demo_server: CogServer) -> None:
    answer = demo_server.predict({"prompt": PROMPT, "seed": 7})
    (picture,) = pictures(answer)
    assert is_red_circle_on_blue(picture)
    assert answer["metrics"]["model"] == demo_server.model
    assert answer["metrics"]["steps"] == MODELS[demo_server.model]
    other = demo_server.predict({"prompt": PROMPT.replace("circle", "triangle"), "seed": 7})
    assert not is_red_circle_on_blue(pictures(other)[0])


def test_unknown_words_are_harmless(demo_server: CogServer) -> None:
    prompt = f"a breathtaking masterpiece of {PROMPT}, trending, 8k"
    answer = demo_server.predict({"prompt": prompt, "seed": 7, "num_outputs": 4})
    assert sum(is_red_circle_on_blue(picture) for picture in pictures(answer)) >= 3


@pytest.mark.parametrize("model", MODELS)
def test_a_demo_model_is_whole_and_equals_stock_diffusers(model: str, tmp_path: Path) -> None:
    folder = install(model, tmp_path, say=lambda _: None)
    assert verify(Manifest.read().models[model], folder) == []
    engine = Engine(Pipeline.load(folder, "cpu", "float32"), tmp_path / "outputs")
    request = GenerationRequest.resolve(engine.card, prompt=PROMPT, seed=3, num_outputs=2)
    stock = StockDiffusers(folder)
    for index, path in enumerate(engine.submit(request).result().paths):
        assert np.abs(pixels_of(path) - stock.image(request, index)).max() <= 1
    engine.close()


def test_no_lora_is_taken_unless_the_server_is_told_where_from(demo_server: CogServer) -> None:
    answer = demo_server.predict({"prompt": PROMPT, "lora_weights": "owner/repo"})
    assert answer["status"] == "failed"
    assert "takes no LoRAs from requests (DMD2_LORA_SOURCES is empty)" in answer["error"]


def test_taesdxl_does_not_fit_its_latents(demo_server: CogServer) -> None:
    answer = demo_server.predict({"prompt": PROMPT, "fast_decode": True})
    assert answer["status"] == "failed"
    assert "has no fast decoder" in answer["error"]


def test_it_is_small_and_says_that_it_is_free() -> None:
    weights = sum(path.stat().st_size for path in DEMO.rglob("*.safetensors"))
    assert weights <= 50_000_000
    assert "CC0" in (DEMO / "LICENSE").read_text()


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
