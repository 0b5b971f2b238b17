"""The judge of the demo's pictures: what it asks of them, and that noise does not please it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from drawn import archive_of_discs
from safetensors.torch import save_file

from training.demo.drawing import draw
from training.demo.drawings import Source
from training.demo.evaluation import Share
from training.demo.judge import (
    LABELS,
    Reading,
    answers,
    load_judge,
    made_worse,
    score,
    train_judge,
)
from training.demo.pictures import World
from training.demo.scenes import Scene, SceneObject, sample
from training.run import Run

CIRCLE = SceneObject("circle", "red", 32, 32, 64)
FOX = SceneObject("fox", None, 0, 16, 56)
ALONE = Scene("sea", (CIRCLE,), "medium", "left", 0)
PAIR = Scene("snow", (FOX, replace(CIRCLE, x=64, side=56)), None, None, 0)
RIGHT = Reading(("red circle",), "sea", "medium", "left")


def test_what_was_asked_for_is_right() -> None:
    assert all(score(RIGHT, ALONE).values())
    assert score(RIGHT, ALONE).keys() == {
        "background", "things", "alone", "all", "size", "position",
    }  # fmt: skip
    both = Reading(("red circle", "fox"), "snow", "small", "top")
    assert score(both, PAIR) == {"background": True, "things": True, "alone": True, "all": True}


@pytest.mark.parametrize(
    ("reading", "wrong"),
    [
        (replace(RIGHT, background="blue"), {"background", "all"}),
        (replace(RIGHT, labels=("blue circle",)), {"things", "alone", "all"}),
        (replace(RIGHT, labels=("red circle", "fox")), {"alone", "all"}),
        (replace(RIGHT, labels=()), {"things", "all"}),
        (replace(RIGHT, size="small"), {"size"}),
        (replace(RIGHT, position="right"), {"position"}),
    ],
)
def test_only_what_is_wrong_is_reported(reading: Reading, wrong: set[str]) -> None:
    assert {name for name, is_right in score(reading, ALONE).items() if not is_right} == wrong


def test_one_of_two_is_not_both() -> None:
    scores = score(Reading(("fox",), "snow", "small", "top"), PAIR)
    assert not scores["things"]
    assert not scores["all"]


def test_it_learns_what_a_scene_holds() -> None:
    labels, background, size, position = answers(PAIR)
    assert {LABELS[int(i)] for i in torch.nonzero(labels)} == {"fox", "red circle"}
    assert (int(size), int(position)) == (-1, -1)
    assert int(answers(ALONE)[1]) != int(background)


def test_it_trains_on_pictures_that_are_worse_and_still_the_same() -> None:
    pictures = torch.zeros(4, 3, 128, 128)
    pictures[:, :, 40:80, 40:80] = 0.8
    worse = made_worse(pictures, torch.Generator().manual_seed(1))
    assert worse.shape == pictures.shape
    assert 0.02 < (worse - pictures).abs().mean() < 0.3


def test_a_judge_reads_pictures_of_its_training(tmp_path: Path) -> None:
    """A few dozen steps on few pictures, which it then knows by heart."""
    archive = archive_of_discs(tmp_path / "discs-0.tgz")
    run = Run(
        Accelerator(cpu=True), tmp_path / "run", num_steps=100, batch_size=4, seed=1,
        log_every=50,
    )  # fmt: skip
    world = World(5, Source.of(archive))
    weights = tmp_path / "judge.safetensors"
    save_file(train_judge(run, world, num_pictures=8).state_dict(), weights)
    scenes = [sample(5, index).scene for index in range(8)]
    seen = np.stack([draw(scene, world.source.drawings()) for scene in scenes])
    readings = load_judge(weights).read(seen)
    assert [r.background for r in readings] == [scene.background for scene in scenes]
    right = [score(r, scene)["things"] for r, scene in zip(readings, scenes, strict=True)]
    assert sum(right) >= 6


def test_an_interval_holds_the_share_and_shrinks_with_their_number() -> None:
    few, many = Share(19, 20).interval(), Share(950, 1000).interval()
    assert few[0] < many[0] < 0.95 < many[1] < few[1]
    assert Share(0, 10).interval()[0] == pytest.approx(0)
