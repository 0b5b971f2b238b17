"""The demo's world: its scenes, its captions and drawings, and the checker that reads them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from training.demo import scenes
from training.demo.checker import read, score
from training.demo.drawing import coverage, draw
from training.demo.scenes import BACKGROUNDS, IMAGE_SIZE, Described, Scene, SceneObject, sample

Picture = NDArray[np.uint8]

HEART = Scene(
    "blue",
    (SceneObject("heart", "yellow", "medium", True, 40.0, 66.0, 27.0, 6.0),),
    position="left",
    relation=None,
    look=5,
)
PAIR = Scene(
    "meadow",
    (
        SceneObject("circle", "red", "small", False, 60.0, 35.0, 14.0, 0.0),
        SceneObject("star", "purple", "large", False, 68.0, 88.0, 28.0, -9.0),
    ),
    position=None,
    relation="above",
    look=6,
)
LOOKS = {"background", "count", "shape", "colour", "size", "smiling"}
LOOKS_OF_PAIRS = {"background", "count", "shapes", "colours", "sizes", "relation"}


def with_changes(scene: Scene, index: int, **changes: Any) -> Scene:
    """The scene with another object in one place."""
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **changes)
    return replace(scene, objects=tuple(objects))


def blurred_and_noisy(image: Picture, seed: int) -> Picture:
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.0))
    noise = np.random.default_rng(seed).normal(0, 6, image.shape)
    return np.clip(np.asarray(blurred) + noise + 0.5, 0, 255).astype(np.uint8)


def shares_right(
    num_scenes: int, num_objects: int, change: Callable[[Picture, int], Picture] | None = None
) -> dict[str, float]:
    """For each attribute, of how many scenes the checker reads it right."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for index in range(num_scenes):
        scene = sample(11, index, num_objects=num_objects).scene
        image = draw(scene) if change is None else change(draw(scene), index)
        scores = score(read(image), scene)
        right.update({name: int(is_right) for name, is_right in scores.items()})
        asked.update(scores.keys())
    return {name: right[name] / asked[name] for name in asked}


def expected_words(described: Described) -> set[str]:
    scene, said = described.scene, described.said
    words = {o.shape for o in scene.objects}
    if "colour" in said:
        words |= {o.colour for o in scene.objects}
    if "size" in said:
        words |= {o.size for o in scene.objects}
    if "smiling" in said:
        words.add("smiling")
    if "background" in said:
        words.add(scene.background)
    if "position" in said:
        words.add(str(scene.position))
    if "relation" in said:
        words.add(str(scene.relation).removesuffix(" of"))
    return words


def test_a_scene_follows_from_its_seed_and_index() -> None:
    for index in range(20):
        first, again = sample(3, index), sample(3, index)
        assert first == again
        assert np.array_equal(draw(first.scene), draw(again.scene))
        for other in (sample(4, index), sample(3, index + 1)):
            assert not np.array_equal(draw(other.scene), draw(first.scene))


def test_another_telling_is_of_the_same_scene() -> None:
    tellings = [sample(3, 0, telling=telling) for telling in range(20)]
    assert len({described.scene for described in tellings}) == 1
    assert len({described.caption for described in tellings}) > 1


def test_a_picture_is_of_the_size_and_type_that_the_vae_takes() -> None:
    image = draw(HEART)
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize("num_objects", [0, 1, 2])
def test_training_shows_no_combination_that_is_held_out(num_objects: int) -> None:
    for index in range(300):
        assert not scenes.is_held_out(sample(5, index, num_objects=num_objects).scene)


def test_a_held_out_caption_names_colour_shape_and_background() -> None:
    for index in range(150):
        described = sample(5, index, held_out=True)
        scene = described.scene
        unseen = [o for o in scene.objects if scenes.is_held_out(replace(scene, objects=(o,)))]
        assert unseen
        assert scene.background in described.caption
        assert all(f"{o.colour} {o.shape}" in described.caption for o in unseen)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_caption_tells_what_it_says_and_nothing_else(held_out: bool) -> None:
    telling = {*scenes.SHAPES, *scenes.SIZES, *scenes.POSITIONS, *BACKGROUNDS}
    telling |= {"smiling", "above", "below"}
    for index in range(300):
        described = sample(6, index, held_out=held_out)
        words = set(described.caption.replace(",", " ").split())
        assert words & telling == expected_words(described)


def test_an_object_alone_keeps_its_margin() -> None:
    for index in range(300):
        (thing,) = sample(7, index, num_objects=1).scene.objects
        nearest = min(thing.x, thing.y, IMAGE_SIZE - thing.x, IMAGE_SIZE - thing.y)
        assert nearest - thing.radius >= 7 - 1e-6


def test_a_relation_is_true_of_the_centres() -> None:
    for index in range(300):
        scene = sample(7, index, num_objects=2).scene
        first, second = scene.objects
        dx, dy = second.x - first.x, second.y - first.y
        along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[str(scene.relation)]
        assert along == max(abs(dx), abs(dy)) > 0


def test_pairs_keep_their_margin_and_their_gap() -> None:
    for index in range(300):
        first, second = sample(7, index, num_objects=2).scene.objects
        apart = max(abs(first.x - second.x), abs(first.y - second.y))
        assert apart >= first.radius + second.radius + 5 - 1e-6
        for thing in (first, second):
            nearest = min(thing.x, thing.y, IMAGE_SIZE - thing.x, IMAGE_SIZE - thing.y)
            assert nearest - thing.radius >= 7 - 1e-6


def test_outlines_reach_beyond_the_radius_but_hardly_ever_touch() -> None:
    num_touching = 0
    for index in range(200):
        covers = [coverage(o) > 0 for o in sample(7, index, num_objects=2).scene.objects]
        num_touching += bool(np.logical_and(*covers).any())
        for cover in (*covers, coverage(sample(7, index, num_objects=1).scene.objects[0]) > 0):
            assert not cover[[0, -1]].any()
            assert not cover[:, [0, -1]].any()
    assert num_touching <= 2


def test_the_checker_reads_single_objects_back() -> None:
    shares = shares_right(300, 1)
    assert shares.keys() == LOOKS | {"position"}
    assert min(shares.values()) >= 0.99, shares


def test_the_checker_reads_pairs_back() -> None:
    shares = shares_right(150, 2)
    assert shares.keys() == LOOKS_OF_PAIRS
    assert min(shares.values()) >= 0.97, shares


def test_the_checker_stands_blur_and_noise() -> None:
    shares = shares_right(150, 1, blurred_and_noisy)
    assert min(shares.values()) >= 0.97, shares


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_picture_without_objects_is_read_as_one(background: str) -> None:
    for look in range(3):
        reading = read(draw(Scene(background, (), None, None, look)))
        assert reading.background == background
        assert reading.objects == ()
        scores = score(reading, replace(HEART, background=background))
        assert scores.keys() == LOOKS | {"position"}
        assert [name for name, is_right in scores.items() if is_right] == ["background"]


@pytest.mark.parametrize("asked", [HEART, PAIR])
@pytest.mark.parametrize("block", [1, 8])
def test_noise_is_nothing_that_was_asked_for(asked: Scene, block: int) -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (IMAGE_SIZE // block,) * 2 + (3,), np.uint8)
    image = blocks.repeat(block, axis=0).repeat(block, axis=1)
    reading = read(image)
    assert reading.background is None
    assert not any(score(reading, asked).values())


@pytest.mark.parametrize(
    ("wrong", "shown", "asked"),
    [
        ("background", HEART, replace(HEART, background="sea")),
        ("position", HEART, replace(HEART, position="center")),
        ("position", HEART, replace(HEART, position="right")),
        ("shape", HEART, with_changes(HEART, 0, shape="triangle")),
        ("shape", with_changes(HEART, 0, shape="triangle"), HEART),
        ("colour", HEART, with_changes(HEART, 0, colour="orange")),
        ("colour", with_changes(HEART, 0, colour="orange"), HEART),
        ("size", HEART, with_changes(HEART, 0, size="large")),
        ("smiling", HEART, with_changes(HEART, 0, smiling=False)),
        ("smiling", with_changes(HEART, 0, smiling=False), HEART),
        ("background", PAIR, replace(PAIR, background="green")),
        ("relation", PAIR, replace(PAIR, relation="below")),
        ("relation", PAIR, replace(PAIR, relation="left of")),
        ("relation", PAIR, replace(PAIR, objects=PAIR.objects[::-1])),
        ("shapes", PAIR, with_changes(PAIR, 1, shape="heart")),
        ("colours", PAIR, with_changes(PAIR, 0, colour="pink")),
        ("sizes", PAIR, with_changes(PAIR, 0, size="medium")),
    ],
)
def test_only_what_is_wrong_is_reported(wrong: str, shown: Scene, asked: Scene) -> None:
    assert all(score(read(draw(shown)), shown).values())
    scores = score(read(draw(shown)), asked)
    assert [name for name, is_right in scores.items() if not is_right] == [wrong]


def test_one_too_many_and_one_too_few_are_reported() -> None:
    circle, star = PAIR.objects
    pair = read(draw(PAIR))
    alone = replace(PAIR, objects=(star,), relation=None)
    scores = score(pair, alone)
    assert not scores["count"]
    assert scores["shape"]
    assert not score(pair, replace(alone, objects=(circle,)))["shape"]
    scores = score(read(draw(alone)), PAIR)
    assert [name for name, is_right in scores.items() if is_right] == ["background"]
