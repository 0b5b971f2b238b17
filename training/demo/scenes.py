"""The captioned world of the demo model: scenes, and captions that tell of them.

A scene is drawn at random from a seed and an index, and so is the caption, which tells a part
of it: what the caption leaves out, the picture is free to choose.

Everything stands on the grid of the latents, in a few sizes: so a thing has the same latents
wherever it stands, and a small network can learn it by heart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from training.demo.icons import HIDDEN_THINGS, THINGS
from training.demo.language import BACKGROUNDS, COLOURS, LANDSCAPES, SHAPES, SIZES, Teller

IMAGE_SIZE = 128
GRID = 8  # pixels of a latent
# Sides in pixels; of one thing alone, such that its middle can be the picture's.
SIDES = {"small": 48, "medium": 64, "large": 96}
SIDE_IN_PAIR = 56

# One combination of thing, colour and background in ten is never shown in training.
_HELD_OUT_SHARE = 0.1
_SHARE_OF_SHAPES = 0.2
_THING_NAMES = tuple(THINGS)

# Colours of shapes that are much like a background, beside the colour itself.
_HIDDEN_COLOURS = {
    "purple": "blue", "meadow": "green", "sea": "blue", "desert": "orange", "snow": "white",
    "night": "black",
}  # fmt: skip


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene.

    Attributes:
        thing: of THINGS or SHAPES.
        colour: of COLOURS, for a shape; None for a thing, which has its own.
        x, y: its box's upper left corner in pixels, multiples of GRID.
        side: of its box in pixels.
    """

    thing: str
    colour: str | None
    x: int
    y: int
    side: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        background: of BACKGROUNDS.
        objects: one or two, which do not overlap.
        size: of SIZES, for one thing alone; else None.
        position: of POSITIONS, for one thing that stands clearly there; else None.
        look: chooses what has no name: light, hills, stars.
    """

    background: str
    objects: tuple[SceneObject, ...]
    size: str | None
    position: str | None
    look: int


@dataclass(frozen=True)
class Described:
    """A scene and what a caption says of it.

    Attributes:
        scene: the whole of it.
        caption: a sentence of the demo's language.
        said: the attributes that the caption tells, as "colour", "size", "background",
            "position"; the things are always told, and "colour" tells of shapes alone.
    """

    scene: Scene
    caption: str
    said: frozenset[str]


def is_held_out(scene: Scene) -> bool:
    """Whether some thing, its colour and the background are kept from training together."""
    return any(_held_out(o.thing, o.colour, scene.background) for o in scene.objects)


def sample(
    seed: int, index: int, *, held_out: bool = False, num_objects: int = 0, telling: int = 0
) -> Described:
    """Scene number index of the data set that a seed stands for.

    Args:
        seed: of the data set.
        index: from 0.
        held_out: draw from the combinations that training never shows, and with a caption that
            names things, colours and background in the plainest way; else from the others.
        num_objects: 1 or 2; 0 for the mixture of training, where a third has two.
        telling: which of its captions.
    """
    rng = np.random.default_rng([seed, index, int(held_out), num_objects])
    while True:
        wants_two = num_objects == 2 or (num_objects == 0 and rng.random() < 1 / 3)
        scene = _pair(rng) if wants_two else _alone(rng)
        if is_held_out(scene) == held_out:
            break
    teller = np.random.default_rng([scene.look, telling])
    if held_out:
        has_shape = any(thing.colour is not None for thing in scene.objects)
        said = _said(teller, scene) | {"background", *(["colour"] if has_shape else [])}
        return Described(scene, caption_of(scene, said), said)
    said = _said(teller, scene)
    return Described(scene, caption_of(scene, said, Teller(teller)), said)


def caption_of(scene: Scene, said: frozenset[str], teller: Teller | None = None) -> str:
    """The sentence that tells the things, and the attributes in said.

    Args:
        scene: what it tells of.
        said: as Described has it; an attribute that the scene lacks is passed over.
        teller: says it in its own words; without one it is said in the plainest.
    """
    teller = teller or Teller()
    nouns = [
        teller.noun(
            thing.thing,
            thing.colour if "colour" in said else None,
            scene.size if "size" in said else None,
        )
        for thing in scene.objects
    ]
    places = [teller.place(scene.background)] if "background" in said else []
    if "position" in said and scene.position is not None:
        places.append(teller.place(scene.position))
    return teller.sentence(nouns, places)


def stands_out(thing: str, colour: str | None, background: str) -> bool:
    """Whether a thing, or a shape of a colour, is seen well against a background."""
    if colour is None:
        return thing not in HIDDEN_THINGS.get(background, ())
    return colour not in (background, _HIDDEN_COLOURS.get(background))


def _alone(rng: np.random.Generator) -> Scene:
    background = _any(rng, BACKGROUNDS)
    thing, colour = _thing_on(rng, background)
    size = _any(rng, SIZES)
    reach = (IMAGE_SIZE - SIDES[size]) // 2
    dx, dy = (_offset(rng, reach) for _ in range(2))
    if background in LANDSCAPES and dy < 0 and rng.random() < 0.6:
        dy = -dy  # in a landscape most things stand on the ground
    placed = SceneObject(thing, colour, reach + dx, reach + dy, SIDES[size])
    return Scene(background, (placed,), size, _position(dx, dy), int(rng.integers(2**31)))


def _pair(rng: np.random.Generator) -> Scene:
    background = _any(rng, BACKGROUNDS)
    first = second = _thing_on(rng, background)
    while second == first:
        second = _thing_on(rng, background)
    corners = _two_corners(rng)
    objects = tuple(
        SceneObject(thing, colour, x, y, SIDE_IN_PAIR)
        for (thing, colour), (x, y) in zip((first, second), corners, strict=True)
    )
    return Scene(background, objects, None, None, int(rng.integers(2**31)))


def _two_corners(rng: np.random.Generator) -> list[tuple[int, int]]:
    """Corners of two boxes: side by side, one above the other, or anywhere apart."""
    last = (IMAGE_SIZE - SIDE_IN_PAIR) // GRID
    room = last - SIDE_IN_PAIR // GRID
    before = rng.integers(room + 1)
    along = [before, rng.integers(before, room + 1) + SIDE_IN_PAIR // GRID]
    anywhere = rng.random() < 0.3
    across = rng.integers(0, last + 1, 2) if anywhere else rng.integers(3, last - 2, 2)
    if rng.random() < 0.5:
        along.reverse()
    corners = [(GRID * int(a), GRID * int(b)) for a, b in zip(along, across, strict=True)]
    return [(y, x) for x, y in corners] if rng.random() < 0.3 else corners


def _offset(rng: np.random.Generator, reach: int) -> int:
    """From the middle, in pixels on the grid: none half of the time, else anywhere."""
    cells = reach // GRID
    return 0 if rng.random() < 0.5 else GRID * int(rng.integers(-cells, cells + 1))


def _position(dx: int, dy: int) -> str | None:
    """The name of an offset from the middle, where one name is clearly right."""
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if along <= GRID:
        return "center"
    if across > along / 2:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def _thing_on(rng: np.random.Generator, background: str) -> tuple[str, str | None]:
    """A thing that stands out against a background, with its colour if it is a shape."""
    while True:
        is_shape = rng.random() < _SHARE_OF_SHAPES
        thing = _any(rng, SHAPES if is_shape else _THING_NAMES)
        colour = _any(rng, COLOURS) if is_shape else None
        if stands_out(thing, colour, background):
            return thing, colour


def _held_out(thing: str, colour: str | None, background: str) -> bool:
    digest = hashlib.sha256(f"{thing}/{colour}/{background}".encode()).digest()
    return digest[0] / 256 < _HELD_OUT_SHARE


def _said(rng: np.random.Generator, scene: Scene) -> frozenset[str]:
    """What a caption of training tells; it may leave anything out but the things."""
    shares = {"colour": 0.92, "background": 0.88}
    if scene.size is not None:
        shares["size"] = 0.5
    if scene.position is not None:
        shares["position"] = 0.5
    has_shape = any(thing.colour is not None for thing in scene.objects)
    told = {name for name, share in shares.items() if rng.random() < share}
    return frozenset(told if has_shape else told - {"colour"})


def _any(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]
