"""The demo's pictures: a thing's drawing or a flat shape, on a background of few looks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from dmd2.settings import ROOT
from training.demo.drawing import draw, sprite_of
from training.demo.drawings import FLUENT_EMOJI, Drawings, Source
from training.demo.icons import THINGS
from training.demo.landscapes import NUM_VARIANTS, RGB, backdrop
from training.demo.language import BACKGROUNDS, SHAPES
from training.demo.scenes import IMAGE_SIZE, Scene, SceneObject, stands_out


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    """A disc for each thing, each in a grey of its own."""
    bodies = {
        icon: f'<circle cx="16" cy="16" r="14" fill="rgb({number},{number},{number})"/>'
        for number, icon in enumerate(THINGS.values(), start=60)
    }
    return Drawings(bodies, 32)


def alone(thing: str, colour: str | None = None, background: str = "blue") -> Scene:
    return Scene(background, (SceneObject(thing, colour, 32, 24, 64),), "medium", "center", 0)


def test_a_thing_has_the_same_pixels_wherever_it_stands(drawings: Drawings) -> None:
    for thing, colour in (("cat", None), ("star", "red")):
        here = SceneObject(thing, colour, 8, 40, 64)
        there = replace(here, x=56, y=16)
        is_solid = sprite_of(here, drawings)[..., 3] == 1
        assert is_solid.sum() > 500
        pixels = [
            draw(Scene("sea", (o,), "medium", None, look), drawings)[
                o.y : o.y + 64, o.x : o.x + 64
            ][is_solid]
            for look, o in enumerate((here, there))
        ]
        assert np.array_equal(*pixels)


def test_a_picture_is_the_background_around_its_things(drawings: Drawings) -> None:
    picture = draw(alone("cat"), drawings)
    assert picture.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert picture.dtype == np.uint8
    number = 60 + list(THINGS).index("cat")
    assert (picture[56, 64] == number).all()
    behind = (backdrop("blue", 0) + 0.5).astype(np.uint8)
    outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
    outside[24:88, 32:96] = False
    assert np.array_equal(picture[outside], behind[outside])
    assert np.array_equal(draw(alone("cat"), drawings), picture), "the background is not changed"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_flat_in_its_box_and_has_its_colour(shape: str, drawings: Drawings) -> None:
    sprite = sprite_of(SceneObject(shape, "red", 0, 0, 64), drawings)
    assert sprite.shape == (64, 64, 4)
    assert sprite.dtype == np.float32
    solid = sprite[sprite[..., 3] == 1]
    assert len(np.unique(solid, axis=0)) == 1
    assert solid[0, 0] > 2 * solid[0, 1:3].max()
    filled = sprite[..., 3].mean()
    assert 0.3 < filled < 0.85
    edge = sprite[..., 3].copy()
    edge[1:-1, 1:-1] = 0
    assert not edge.any(), "not cut off"


def test_shapes_differ(drawings: Drawings) -> None:
    covers = [sprite_of(SceneObject(shape, "red", 0, 0, 64), drawings)[..., 3] for shape in SHAPES]
    for number, cover in enumerate(covers):
        assert all(np.abs(cover - other).mean() > 0.04 for other in covers[:number])


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_background_has_a_few_looks(background: str) -> None:
    looks = [backdrop(background, look) for look in range(NUM_VARIANTS)]
    assert backdrop(background, NUM_VARIANTS) is looks[0]
    assert all(not np.array_equal(a, b) for a in looks for b in looks if a is not b)
    for picture in looks:
        assert picture.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert not picture.flags.writeable
        mean: NDArray[np.float32] = picture.mean(axis=(0, 1))
        if background in RGB:
            nearest = min(RGB, key=lambda name: float(np.abs(mean - RGB[name]).sum()))
            assert nearest == background


@pytest.mark.skipif(
    not (ROOT / "training" / "runs" / FLUENT_EMOJI.archive).exists(),
    reason="Fluent Emoji was not fetched: scripts/train demo does",
)
def test_fluent_emoji_draws_every_thing_so_that_it_is_seen() -> None:
    fluent_emoji = Source(ROOT / "training" / "runs").drawings()
    for thing in THINGS:
        (placed,) = alone(thing).objects
        sprite = sprite_of(placed, fluent_emoji)
        is_solid = sprite[..., 3] > 0.9
        assert is_solid.mean() > 0.1, thing
        for background in BACKGROUNDS:
            if not stands_out(thing, None, background):
                continue
            behind = backdrop(background, 0)[24:88, 32:96]
            differs = np.abs(255 * sprite[..., :3] - behind)[is_solid].max(axis=1) > 40
            assert differs.mean() > 0.25, (thing, background, differs.mean())
