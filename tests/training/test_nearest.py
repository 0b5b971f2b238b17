"""The reading of pictures by their nearest drawing."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import archive_of_discs

from training.demo.drawing import draw
from training.demo.drawings import Source
from training.demo.icons import SUBJECT
from training.demo.nearest import in_the_center, nearest


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Discs, each of its own colour, for things."""
    return Source.of(archive_of_discs(tmp_path_factory.mktemp("discs") / "discs-0.tgz"))


def test_drawings_are_read_as_what_they_are_though_blurred_and_noisy(source: Source) -> None:
    asked = [(SUBJECT, None), ("fox", None), ("star", "red"), ("star", "green")]
    pictures = np.stack([draw(in_the_center(t, "blue", c), source.drawings()) for t, c in asked])
    noise = np.random.default_rng(0).normal(0, 20, pictures.shape)
    worse = np.clip(pictures + noise, 0, 255).astype(np.uint8)
    expected = [SUBJECT, "fox", "red star", "green star"]
    assert nearest(pictures, "blue", source) == expected
    assert nearest(worse, "blue", source) == expected


def test_a_thing_in_another_look_and_a_little_off_is_still_found(source: Source) -> None:
    scene = in_the_center("castle", "white")
    (thing,) = scene.objects
    moved = type(thing)("castle", None, thing.x + 8, thing.y - 8, thing.side)
    other = type(scene)("white", (moved,), scene.size, None, 3)
    assert nearest(draw(other, source.drawings())[None], "white", source) == ["castle"]
