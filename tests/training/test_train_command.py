"""scripts/train as a user types it: from nothing to models that the container serves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import train_cli
from accelerate.state import AcceleratorState
from drawn import archive_of_discs
from PIL import Image
from safetensors.torch import load_file

from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.settings import ROOT
from dmd2.store.install import install
from dmd2.store.manifest import Manifest, quick_problems
from training.__main__ import make_demo
from training.config import QUICK
from training.demo import results
from training.demo.bundle import install_bundle, unpack
from training.demo.drawing import draw
from training.demo.drawings import Source
from training.demo.evaluation import Sizes, Standards
from training.demo.language import COLOURS, known_words
from training.demo.nearest import in_the_center
from training.method.student import lora_modules

TRAIN = ROOT / "scripts" / "train"


def unnamed() -> list[str]:
    """What runs a command on a machine whose own name resolves to nothing, where that can be."""
    prefix = ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh"]
    works = shutil.which("unshare") and shutil.which("hostname")
    if works and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
        return prefix
    return []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The whole way, quickly, in two processes; its folder and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    drawings = archive_of_discs(runs / "discs-0.tgz")
    command = [*unnamed(), TRAIN, "demo", "--quick", "--runs", runs, "--processes", "2"]
    command += ["--drawings", drawings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return SimpleNamespace(runs=runs, drawings=drawings, bundle=runs / "bundle", output=done.stdout)


def test_it_says_where_the_models_are(trained: SimpleNamespace) -> None:
    assert Path(trained.output.strip().splitlines()[-1]) == trained.bundle


@pytest.mark.parametrize(
    "phase", ["vae", "judge", "teacher", "4step", "lora", "1step-warm-start", "1step", "subject"]
)
def test_every_phase_leaves_a_log(trained: SimpleNamespace, phase: str) -> None:
    lines = (trained.runs / phase / "log.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] in (2, 4)
    assert set(last) > {"step", "seconds"}


def test_the_bundle_is_whole_and_small(trained: SimpleNamespace) -> None:
    assert quick_problems(trained.bundle) == []
    weights = sum(path.stat().st_size for path in trained.bundle.rglob("*.safetensors"))
    assert weights <= 60_000_000
    assert "Copyright (c) Microsoft" in (trained.bundle / "LICENSE").read_text()
    assert (trained.bundle / "words.txt").read_text().split() == known_words()


def test_the_bundle_does_not_tell_where_it_was_made(trained: SimpleNamespace) -> None:
    for path in trained.bundle.rglob("*.json"):
        assert str(trained.runs) not in path.read_text()


def test_the_making_can_begin_with_a_bundle(trained: SimpleNamespace, tmp_path: Path) -> None:
    bundle = shutil.copytree(trained.bundle, tmp_path / "bundle")
    (bundle / "variants" / "1step-unet.safetensors").unlink()
    unpack(bundle, tmp_path, QUICK)
    for folder in ("teacher/model/unet", "vae/model", "4step/unet"):
        again, made = (
            load_file(runs / folder / "diffusion_pytorch_model.safetensors")
            for runs in (tmp_path, trained.runs)
        )
        assert again.keys() == made.keys()
        for name, weight in made.items():
            torch.testing.assert_close(again[name], weight, atol=1e-3, rtol=1e-3)
    for file in ("lora/lora.safetensors", "subject/hedgehog.safetensors"):
        assert (tmp_path / file).read_bytes() == (trained.runs / file).read_bytes()
    assert not (tmp_path / "1step").exists()


def test_distilling_can_begin_with_a_bundles_teacher(
    trained: SimpleNamespace, tmp_path: Path
) -> None:
    unpack(trained.bundle, tmp_path, QUICK, students=False)
    assert {path.name for path in tmp_path.iterdir()} == {"vae", "teacher"}


def test_a_teacher_of_another_world_is_not_distilled(
    trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, in this process; smaller networks than the demo's stand for another world."""
    arguments = ["demo", "--begin-with", str(trained.bundle), "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit, match="was trained on an earlier world"):
        train_cli.main()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_cannot_be_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["train", "demo", "--begin-with", str(tmp_path)])
    with pytest.raises(SystemExit, match="is no bundle of the demo: it has no variants"):
        train_cli.main()


def test_nothing_is_left_to_make_of_what_is_shipped(tmp_path: Path) -> None:
    unpack(ROOT / "weights" / "demo", tmp_path)
    files = ("vae/model", "teacher/model", "4step/unet", "1step/unet", "lora/lora.safetensors")
    for name in (*files, "subject/hedgehog.safetensors", "judge/judge.safetensors"):
        assert (tmp_path / name).exists(), name


def test_the_bundled_lora_reaches_every_module_of_the_blocks(trained: SimpleNamespace) -> None:
    pipeline = Pipeline.load(trained.bundle, "cpu", "float32")
    lora = load_file(trained.bundle / "variants" / "4step-lora.safetensors")
    assert len(lora) == 3 * len(lora_modules(pipeline.unet.plain))


class InThisProcess(ThreadPoolExecutor):
    """A pool without processes, whose starts are most of what few pictures cost."""

    def __init__(self, workers: int, mp_context: Any = None) -> None:
        super().__init__(1)


@pytest.mark.parametrize("is_unpacked", [False, True])
def test_the_results_are_written_with_their_error_bars(
    is_unpacked: bool, trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of painters that draw foxes whatever is asked, and hedgehogs with the LoRA.

    Models that were unpacked have no logs.
    """
    source = Source.of(trained.drawings)

    def new_painter(folder: Path, *_: Any) -> Any:
        thing = "hedgehog" if folder.name == "taught" else "fox"

        def paint(captions: Sequence[str], _: Any) -> Any:
            on = [next((c for c in COLOURS if f"a {c} back" in text), "red") for text in captions]
            return np.stack([draw(in_the_center(thing, c), source.drawings()) for c in on])

        return paint

    for name in ("few_step_painter", "many_step_painter"):
        monkeypatch.setattr(results, name, new_painter)
    monkeypatch.setattr(results, "ProcessPoolExecutor", InThisProcess)
    judge = trained.runs / "judge" / "judge.safetensors"
    results.write_results(
        QUICK,
        tmp_path if is_unpacked else trained.runs,
        tmp_path / "teacher",
        {name: tmp_path / name for name in ("4step", "1step", "lora")},
        tmp_path / "taught",
        tmp_path,
        Sizes(alone=3, pairs=2, frechet=3, diversity=2, subject=1),
        Standards(source, judge),
    )
    text = (tmp_path / "training" / "RESULTS.md").read_text()
    for name in ("DDIM in 20", "DDIM in 1", "student 4step", "student 1step", "student lora"):
        assert text.count(name) == 3, name
    assert "| with the LoRA | 100.0 (68-100) |" in text
    assert "| without it | 0.0 (0-32) |" in text
    with Image.open(tmp_path / "docs" / "contact-sheet.png") as sheet:
        assert sheet.size == (128 * len(results.SHEET_CAPTIONS), 128 * 6)
    assert ("## Training time" in text) is not is_unpacked
    assert (tmp_path / "docs" / "training-losses.png").exists() is not is_unpacked


def test_a_second_run_has_nothing_to_do(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the command's processes do, without their start."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    before = {path: path.stat().st_mtime_ns for path in trained.runs.rglob("*")}
    for phases in train_cli.PHASES_OF_DEMO:
        AcceleratorState._reset_state(reset_partial_state=True)
        make_demo(phases, trained.runs, trained.drawings, is_quick=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert {path: path.stat().st_mtime_ns for path in trained.runs.rglob("*")} == before


def test_phases_of_different_precision_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="judge: trained in bfloat16"):
        make_demo(["judge", "data"], tmp_path, is_quick=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("model", "steps"), [("demo", 4), ("demo-1step", 1), ("demo-lora", 4)])
def test_the_three_models_are_made_of_the_bundle_and_run(
    trained: SimpleNamespace, tmp_path: Path, model: str, steps: int
) -> None:
    manifest_path = tmp_path / "manifest.json"
    manifest_path.write_text((ROOT / "weights" / "manifest.json").read_text())
    install_bundle(trained.bundle, tmp_path, manifest_path)
    folder = install(model, tmp_path, manifest=Manifest.read(manifest_path), say=lambda _: None)
    pipeline = Pipeline.load(folder, "cpu", "float32")
    assert pipeline.card.name == model
    request = GenerationRequest.resolve(pipeline.card, prompt="a red circle", seed=1)
    assert (request.width, request.num_inference_steps) == (128, steps)
    sample = pipeline.start(request, 0, *pipeline.encode([request]))
    while not sample.trajectory.done:
        pipeline.step([sample])
    (picture,) = pipeline.decode([sample])
    assert picture.pixels().shape == (128, 128, 3)


def test_unknown_words_end_in_the_usage() -> None:
    done = subprocess.run([TRAIN, "demo", "--fast"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unrecognized arguments: --fast" in done.stderr
