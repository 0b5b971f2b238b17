"""What whoever waits at a terminal is shown."""

from __future__ import annotations

import json
import time
from pathlib import Path

import progress_bar
import pytest

from dmd2.engine.engine import Engine
from dmd2.engine.progress import ProgressFile
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline


def test_every_image_of_every_unit_is_a_line(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "progress"
    engine = Engine(pipeline, tmp_path / "out", progress=ProgressFile(path))
    request = GenerationRequest.resolve(engine.card, prompt="x", num_outputs=2)
    took = sum(engine.submit(request).result(timeout=30).seconds.values())
    engine.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step"] * 8 + ["decode"] * 2
    assert all(line["num_inference_steps"] == 4 and line["num_outputs"] == 2 for line in lines)
    assert 0 < sum(line["seconds"] for line in lines) <= took
    assert "x" not in {str(value) for line in lines for value in line.values()}


def test_a_file_that_takes_nothing_disturbs_nobody(
    pipeline: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(pipeline, tmp_path / "out", progress=ProgressFile(tmp_path / "no" / "file"))
    request = GenerationRequest.resolve(engine.card, prompt="x")
    assert engine.submit(request).result(timeout=30).paths[0].exists()
    engine.close()
    assert "takes no progress" in caplog.text


def follow(path: Path, kinds: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What the bar shows while lines come in."""
    facts = {"seconds": 1.0, "num_inference_steps": 4, "num_outputs": 2}
    with progress_bar.progress_bar(path):
        for kind in kinds:
            with path.open("a") as file:
                file.write(json.dumps({"kind": kind, **facts}) + "\n")
            time.sleep(0.02)
        time.sleep(0.1)
    return capfd.readouterr().err


def test_the_bar_tells_steps_images_and_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_bar, "SHOW_AFTER_S", 0.05)
    monkeypatch.setattr(progress_bar, "LOOK_S", 0.01)
    shown = follow(tmp_path / "p", ["step"] * 8 + ["decode"], capfd)
    assert "8 steps, 1 images" in shown
    assert " 86% " in shown, "of 8 steps and 2 decodes, each as long as one and a half"
    assert " left" in shown


def test_what_is_over_soon_shows_no_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert follow(tmp_path / "p", ["step"] * 4, capfd) == ""
