"""The safety checker: what it sees, what becomes of flagged images, and that it fails closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from components import PREPROCESSOR, write_checker
from model_folders import copy_with, pixels_of
from servers import start
from transformers import ViTForImageClassification, ViTImageProcessorPil

from dmd2.engine.engine import Engine
from dmd2.errors import MissingWeightsError, ModelError, UnsafeContentError
from dmd2.models.safety import SafetyChecker, is_flagged
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.settings import SafetyMode
from dmd2.store.manifest import write_record

TIMESTEPS = {"4": [999, 749, 499, 249], "2": [999, 499]}


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checker(tmp_path_factory.mktemp("weights") / "nsfw-checker").parent


@pytest.fixture(scope="module")
def checked_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a card that asks for a safety checker."""
    folder = tmp_path_factory.mktemp("checked") / "tiny"
    copy_with(model_folder, folder, "dmd2.json", lambda card: card.pop("safety_checker"))
    return folder


@pytest.fixture(scope="module")
def checked(checked_folder: Path, weights_dir: Path) -> Pipeline:
    return Pipeline.load(checked_folder, "cpu", components=weights_dir, check_safety=True)


def set_scores(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, score_of: Callable[[int], float]
) -> None:
    """Give the n-th image that is classified from now on the score score_of(n)."""
    numbers = iter(range(100))

    def scores(pixels: torch.Tensor) -> torch.Tensor:
        return torch.tensor([score_of(next(numbers)) for _ in pixels])

    monkeypatch.setattr(pipeline._safety_checker, "scores", scores)


@pytest.fixture
def run(checked: Pipeline, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Run a request of four images on an engine in a safety mode."""
    engines = []

    def run_it(mode: SafetyMode = "withhold", **inputs: Any) -> Any:
        engines.append(Engine(checked, tmp_path, safety=mode))
        asked = {"prompt": "a red circle", "seed": 7, "num_outputs": 4, **inputs}
        return engines[-1].submit(GenerationRequest.resolve(checked.card, **asked)).result(20)

    yield run_it
    for engine in engines:
        engine.close()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 96), (40, 200)])
@torch.inference_mode()
def test_it_sees_what_transformers_own_processor_shows_it(
    height: int, width: int, weights_dir: Path
) -> None:
    folder = weights_dir / "nsfw-checker"
    model = ViTForImageClassification.from_pretrained(folder).eval()
    processor = ViTImageProcessorPil.from_pretrained(folder)
    pixels = np.random.default_rng(height).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    pixels[1] = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    expected = processor(list(pixels), return_tensors="pt")["pixel_values"]
    checker = SafetyChecker(model, folder)
    found = checker._prepared(torch.from_numpy(pixels))
    step = 1 / 255 / torch.tensor(PREPROCESSOR["image_std"]).view(3, 1, 1)
    assert ((found - expected).abs() <= 1.01 * step).all(), "one step of 1/255 at most"
    probabilities = model(pixel_values=expected).logits.softmax(dim=1)[:, 1]
    torch.testing.assert_close(
        checker.scores(torch.from_numpy(pixels)), probabilities, atol=0.02, rtol=0
    )


def test_a_flagged_image_is_withheld_and_the_others_are_returned(
    run: Callable[..., Any], checked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_scores(checked, monkeypatch, lambda n: 0.9 if n == 1 else 0.1)
    result = run()
    assert [path.stem[-1] for path in result.paths] == ["0", "2", "3"]
    assert result.nsfw_scores == pytest.approx([0.1, 0.9, 0.1, 0.1])
    assert (result.flagged, result.withheld) == ([1], [1])
    assert result.notes == ["image 1 was withheld by the safety checker (nsfw 0.900)"]
    assert set(result.seconds) >= {"check"}


def test_if_all_are_withheld_the_request_fails(
    run: Callable[..., Any], checked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_scores(checked, monkeypatch, lambda n: 0.75)
    with pytest.raises(UnsafeContentError, match=r"every image.*nsfw 0\.750.*Change the prompt"):
        run()


@pytest.mark.parametrize("mode", ["blur", "flag"])
def test_operators_may_blur_or_flag_instead(
    mode: SafetyMode, run: Callable[..., Any], checked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(disable_safety_checker=True)
    set_scores(checked, monkeypatch, lambda n: 0.9 if n == 1 else 0.1)
    result = run(mode)
    assert (result.flagged, result.withheld) == ([1], [])
    for index, (one, other) in enumerate(zip(result.paths, plain.paths, strict=True)):
        one, other = pixels_of(one), pixels_of(other)
        if mode == "blur" and index == 1:
            assert one.shape == other.shape
            assert np.abs(np.diff(one, axis=1)).mean() < np.abs(np.diff(other, axis=1)).mean() / 5
        else:
            assert np.abs(one - other).max() <= 1


def test_disabled_for_a_request_nothing_is_checked(
    run: Callable[..., Any], checked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_scores(checked, monkeypatch, lambda n: 0.9)
    result = run(disable_safety_checker=True)
    assert len(result.paths) == 4
    assert result.nsfw_scores == [None] * 4
    assert result.flagged == []


def test_a_checker_that_fails_withholds(
    run: Callable[..., Any], checked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a kernel broke")

    monkeypatch.setattr(checked._safety_checker, "_model", broken)
    with pytest.raises(UnsafeContentError, match="it failed, it failed, it failed, it failed"):
        run()
    monkeypatch.undo()
    assert len(run("flag").paths) == 4


@pytest.mark.parametrize(("score", "flagged"), [(0.49, False), (0.5, True), (float("nan"), True)])
def test_only_a_score_below_a_half_passes(score: float, flagged: bool) -> None:
    assert is_flagged(score) == flagged
    assert is_flagged(None)


def test_a_decode_that_was_done_again_is_checked_too(
    checked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerationRequest.resolve(checked.card, prompt="a star", seed=1)
    sample = checked.start(request, 0, checked.encode([request])[0])
    for _ in request.timesteps:
        checked.step([sample])
    set_scores(checked, monkeypatch, lambda n: [0.1, 0.9][n])
    (picture,) = checked.decode([sample])
    again = replace(picture, _is_finite=torch.tensor(False))
    assert picture.result()[1] == pytest.approx(0.1)
    pixels, score = again.result()
    assert score == pytest.approx(0.9)
    assert np.abs(pixels.astype(int) - picture.pixels()).max() <= 1


def test_without_it_a_model_that_needs_it_is_not_served(
    checked_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(MissingWeightsError, match=r"`scripts/download-weights nsfw-checker`.*off"):
        Pipeline.load(checked_folder, "cpu", components=tmp_path, check_safety=True)


def test_a_model_that_asks_for_none_has_none(model_folder: Path, weights_dir: Path) -> None:
    plain = Pipeline.load(model_folder, "cpu", components=weights_dir, check_safety=True)
    assert not plain.card.checks_safety
    request = GenerationRequest.resolve(plain.card, prompt="x", disable_safety_checker=True)
    assert request.notes == ("disable_safety_checker does nothing: no safety checker is at work",)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", lambda c: c.update(id2label={"0": "cat", "1": "dog"}), "no 'nsfw'"),
        ("preprocessor_config.json", lambda c: c.update(resample=3), "not 2, bilinear"),
        ("preprocessor_config.json", lambda c: c.update(do_normalize=False), "normalised"),
    ],
)
def test_another_classifier_is_refused(
    file: str, change: Any, said: str, checked_folder: Path, weights_dir: Path, tmp_path: Path
) -> None:
    copy_with(weights_dir / "nsfw-checker", tmp_path / "nsfw-checker", file, change)
    (tmp_path / "nsfw-checker" / "installed.json").unlink()
    write_record(tmp_path / "nsfw-checker", {"model": "nsfw-checker"})
    with pytest.raises(ModelError, match=said):
        Pipeline.load(checked_folder, "cpu", components=tmp_path, check_safety=True)


def test_the_server_withholds(checked_folder: Path, tmp_path: Path) -> None:
    write_checker(tmp_path / "nsfw-checker", nsfw_bias=1000.0)
    environment = {"DMD2_WEIGHTS_DIR": str(tmp_path), "DMD2_OUTPUT_DIR": str(tmp_path / "out")}
    with start(checked_folder, **environment) as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        refused = server.predict({"prompt": "x", "seed": 1, "num_outputs": 2})
        assert refused["status"] == "failed"
        assert "withheld every image (nsfw 1.000, nsfw 1.000)" in refused["error"]
        allowed = server.predict({"prompt": "x", "seed": 1, "disable_safety_checker": True})
        assert allowed["status"] == "succeeded"
        assert "flagged" not in allowed["metrics"]
