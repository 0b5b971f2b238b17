"""The demo's scenes: on the latents' grid, apart from one another, and well seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from training.demo.icons import HIDDEN_THINGS, THINGS
from training.demo.language import BACKGROUNDS, COLOURS, POSITIONS, SHAPES
from training.demo.scenes import (
    GRID,
    IMAGE_SIZE,
    SIDE_IN_PAIR,
    SIDES,
    Scene,
    SceneObject,
    is_held_out,
    sample,
    stands_out,
)


def scenes_of(num: int, **how: int | bool) -> Iterable[Scene]:
    return (sample(7, index, **how).scene for index in range(num))


def test_a_scene_follows_from_its_seed_and_index() -> None:
    for index in range(20):
        first, again = sample(3, index), sample(3, index)
        assert first == again
        assert sample(4, index).scene != first.scene != sample(3, index + 1).scene


@pytest.mark.parametrize("num_objects", [0, 1, 2])
def test_training_shows_no_combination_that_is_held_out(num_objects: int) -> None:
    assert not any(is_held_out(scene) for scene in scenes_of(400, num_objects=num_objects))


def test_one_combination_in_ten_is_held_out() -> None:
    shares = [
        np.mean(
            [
                is_held_out(Scene(b, (SceneObject(thing, colour, 0, 0, 64),), "medium", None, 0))
                for thing in things
                for b in BACKGROUNDS
            ]
        )
        for things, colour in ((THINGS, None), *((SHAPES, colour) for colour in COLOURS))
    ]
    assert 0.07 < shares[0] < 0.13
    assert 0.05 < np.mean(shares[1:]) < 0.15


def test_training_shows_every_thing_and_a_third_of_pairs() -> None:
    seen = list(scenes_of(3000))
    things = {o.thing for scene in seen for o in scene.objects}
    assert things == {*THINGS, *SHAPES}
    assert {scene.background for scene in seen} == set(BACKGROUNDS)
    assert 0.3 < np.mean([len(scene.objects) == 2 for scene in seen]) < 0.37


def test_everything_stands_whole_on_the_grid() -> None:
    for scene in scenes_of(600):
        for o in scene.objects:
            assert o.x % GRID == o.y % GRID == o.side % GRID == 0
            assert min(o.x, o.y) >= 0
            assert max(o.x, o.y) + o.side <= IMAGE_SIZE
            assert o.side == (SIDE_IN_PAIR if scene.size is None else SIDES[scene.size])


def test_two_things_do_not_overlap_and_are_two() -> None:
    for scene in scenes_of(600, num_objects=2):
        first, second = scene.objects
        assert max(abs(first.x - second.x), abs(first.y - second.y)) >= SIDE_IN_PAIR
        assert (first.thing, first.colour) != (second.thing, second.colour)
        assert scene.position is scene.size is None


def test_a_position_is_true_of_the_middle() -> None:
    told = Counter[str | None]()
    for scene in scenes_of(600, num_objects=1):
        (o,) = scene.objects
        dx, dy = (place + o.side // 2 - IMAGE_SIZE // 2 for place in (o.x, o.y))
        away = {"left": -dx, "right": dx, "top": -dy, "bottom": dy}
        if scene.position == "center":
            assert max(away.values()) <= GRID
        elif scene.position is not None:
            assert away[scene.position] == max(away.values()) >= 2 * GRID
            assert sorted(map(abs, (dx, dy)))[0] * 2 <= away[scene.position]
        told[scene.position] += 1
    assert set(told) == {*POSITIONS, None}


def test_what_would_not_be_seen_is_not_drawn() -> None:
    assert not stands_out("circle", "red", "red")
    assert stands_out("circle", "red", "blue")
    assert not stands_out("frog", None, "green")
    assert stands_out("frog", None, "meadow")
    for scene in scenes_of(600):
        assert all(stands_out(o.thing, o.colour, scene.background) for o in scene.objects)


def test_the_hidden_are_things_and_backgrounds() -> None:
    assert set(HIDDEN_THINGS) <= set(BACKGROUNDS)
    assert {thing for things in HIDDEN_THINGS.values() for thing in things} <= set(THINGS)
