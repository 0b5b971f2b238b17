"""The demo's language: captions are true of their scenes, and words that it knows are known."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from unknown_words import unknown_words

from training.demo.icons import THINGS
from training.demo.language import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    SYNONYMS,
    WORDS,
    known_words,
)
from training.demo.scenes import Described, Scene, SceneObject, caption_of, is_held_out, sample

ALL = frozenset({"colour", "background", "size", "position"})


def alone(thing: str, colour: str | None = None, background: str = "blue") -> Scene:
    return Scene(background, (SceneObject(thing, colour, 32, 24, 64),), "medium", "center", 0)


def without_articles(phrase: str) -> tuple[str, ...]:
    words = phrase.replace(",", " ").split()
    return tuple(word for word in words if word not in ("a", "an", "the"))


def meanings() -> dict[tuple[str, ...], str]:
    """Each phrase of the language without its articles, and the name that it stands for."""
    named = {name: name for name in (*THINGS, *SHAPES, *COLOURS, *SIZES)}
    named |= SYNONYMS | {"in the sky": "blue"}
    named |= {phrase: name for name, those in PLACES.items() for phrase in those}
    return {without_articles(phrase): name for phrase, name in named.items()}


MEANINGS = meanings()


def names_told(caption: str) -> Counter[str]:
    """What a caption names, where of two phrases the longer is meant."""
    words, told = without_articles(caption), Counter[str]()
    while words:
        length = next((n for n in (4, 3, 2, 1) if words[:n] in MEANINGS), 0)
        if length:
            told[MEANINGS[words[:length]]] += 1
        words = words[length or 1 :]
    return told


def names_due(described: Described) -> Counter[str]:
    scene, said = described.scene, described.said
    due = Counter(o.thing for o in scene.objects)
    if "colour" in said:
        due.update(o.colour for o in scene.objects if o.colour is not None)
    if "background" in said:
        due[scene.background] += 1
    due.update(
        str(value)
        for name, value in (("size", scene.size), ("position", scene.position))
        if name in said
    )
    return due


def test_another_telling_is_of_the_same_scene() -> None:
    tellings = [sample(3, 0, telling=telling) for telling in range(20)]
    assert len({described.scene for described in tellings}) == 1
    assert len({described.caption for described in tellings}) > 5


def test_a_held_out_caption_is_plain_and_names_what_was_never_shown() -> None:
    for index in range(200):
        described = sample(5, index, held_out=True)
        scene = described.scene
        assert is_held_out(scene)
        assert described.said >= {"background"}
        assert described.caption == caption_of(scene, described.said)
        assert all(o.colour is None or f"{o.colour} {o.thing}" in described.caption
                   for o in scene.objects)  # fmt: skip


@pytest.mark.parametrize("held_out", [False, True])
def test_a_caption_tells_what_it_says_and_nothing_else(held_out: bool) -> None:
    for index in range(2000):
        described = sample(6, index, held_out=held_out)
        assert names_told(described.caption) == names_due(described), described.caption


def test_captions_leave_out_and_tell_in_turn() -> None:
    told = [sample(6, index, num_objects=1) for index in range(600)]
    shares = {name: np.mean([name in d.said for d in told]) for name in ALL}
    assert 0.84 < shares["background"] < 0.92
    assert 0.43 < shares["size"] < 0.57
    shapes = [d for d in told if d.scene.objects[0].colour is not None]
    assert 0.84 < np.mean(["colour" in d.said for d in shapes]) < 0.98


def test_plain_sentences() -> None:
    assert caption_of(alone("cat"), ALL) == "a medium cat on a blue background, in the center"
    assert caption_of(alone("umbrella", None, "sea"), frozenset()) == "an umbrella"
    circle = alone("circle", "orange", "night")
    assert caption_of(circle, frozenset({"colour", "background"})) == "an orange circle at night"
    (dog,) = alone("dog").objects
    pair = Scene("meadow", (*alone("cat").objects, dog), None, None, 0)
    assert caption_of(pair, ALL) == "a cat and a dog on a meadow"


def test_every_caption_is_of_known_words() -> None:
    known = set(known_words())
    for index in range(1500):
        described = sample(8, index)
        assert unknown_words(described.caption, known) == [], described.caption


def test_unknown_words_are_named_once_in_order() -> None:
    known = set(known_words())
    assert unknown_words("A cute Kitten, on the LEFT; sunflower\u2019s field!", known) == []
    assert unknown_words("A zeppelin, a cat's Törtchen and a ZEPPELIN at 7", known) == [
        "zeppelin", "törtchen", "7",
    ]  # fmt: skip
    assert unknown_words("", known) == []


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a fox left of a tree", ["left of"]),
        ("a fox to the RIGHT  of a tree, under a cloud", ["right of", "under"]),
        ("a fox above a tree below a cloud", ["above", "below"]),
        ("a cat on top of a car on the left side of a house", ["top of", "left side of"]),
        ("a fox on the left of the picture, under the stars", []),
        ("a cup of tea at the top, a cat on the right", []),
    ],
)
def test_relations_are_named_and_places_are_not(prompt: str, said: list[str]) -> None:
    assert unknown_words(prompt, set(known_words())) == said


def test_known_words_are_sorted_and_what_means_nothing_means_nothing() -> None:
    words = known_words()
    assert words == sorted(set(words))
    assert all(word.islower() and " " not in word for word in words)
    passed_over = set(words) - set(WORDS)
    assert {"photo", "beautiful", "sitting"} <= passed_over
    assert {word for phrase in MEANINGS for word in phrase} <= set(WORDS)


def test_a_synonym_stands_for_something_else() -> None:
    names = {*THINGS, *SHAPES, *COLOURS, *SIZES}
    assert set(SYNONYMS.values()) <= names
    assert not set(SYNONYMS) & names
