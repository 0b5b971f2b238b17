"""Which drawing a picture is nearest to: a reading that needs no training, also of new things."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.demo.drawing import draw
from training.demo.drawings import Source
from training.demo.icons import SUBJECT, THINGS
from training.demo.landscapes import NUM_VARIANTS
from training.demo.language import COLOURS, SHAPES
from training.demo.scenes import GRID, IMAGE_SIZE, SIDES, Scene, SceneObject

SIZE = "large"
_SHRUNK = 32  # the side in pixels at which pictures are compared
_OFFSETS = (-GRID, 0, GRID)


def in_the_center(thing: str, background: str, colour: str | None = None) -> Scene:
    """A scene of one large thing in the middle."""
    return _scene(thing, colour, background, 0, 0, 0)


def nearest(pictures: NDArray[np.uint8], background: str, source: Source) -> list[str]:
    """What each picture shows, as judge.LABELS says it, or SUBJECT.

    A picture is compared with drawings of everything that the demo knows and of the subject, large
    on the background in all its looks, in the middle and up to one cell of the grid off it, by
    the mean square of the pixels' difference at a quarter of their size.

    Args:
        pictures: of one large thing in the middle, uint8 [N, 128, 128, 3].
        background: theirs, of BACKGROUNDS.
        source: of the drawings.
    """
    names, drawn = _everything(background, source)
    rows = _shrunk(pictures)
    distances = (rows**2).sum(1)[:, None] - 2 * rows @ drawn.T + (drawn**2).sum(1)
    return [names[int(place)] for place in distances.argmin(axis=1)]


@cache
def _everything(background: str, source: Source) -> tuple[list[str], NDArray[np.float32]]:
    things: list[tuple[str, str | None]] = [(thing, None) for thing in (*THINGS, SUBJECT)]
    things += [(shape, colour) for shape in SHAPES for colour in COLOURS if colour != background]
    names, pictures = [], []
    for thing, colour in things:
        for look in range(NUM_VARIANTS):
            for dx in _OFFSETS:
                for dy in _OFFSETS:
                    scene = _scene(thing, colour, background, dx, dy, look)
                    pictures.append(draw(scene, source.drawings()))
                    names.append(thing if colour is None else f"{colour} {thing}")
    return names, _shrunk(np.stack(pictures))


def _scene(thing: str, colour: str | None, background: str, dx: int, dy: int, look: int) -> Scene:
    side = SIDES[SIZE]
    corner = (IMAGE_SIZE - side) // 2
    placed = SceneObject(thing, colour, corner + dx, corner + dy, side)
    return Scene(background, (placed,), SIZE, "center", look)


def _shrunk(pictures: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.float32]:
    """Float32 [N, 3 * 32 * 32] in 0..1."""
    size = (_SHRUNK, _SHRUNK)
    small = [Image.fromarray(p).resize(size, Image.Resampling.BOX) for p in pictures]
    return np.stack([np.asarray(p, np.float32).ravel() for p in small]) / np.float32(255)
