"""Which drawing a picture is nearest to: a reading that needs no training, also of new things."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from training.demo.drawing import sprite_of
from training.demo.drawings import Source
from training.demo.icons import SUBJECT, THINGS
from training.demo.landscapes import NUM_VARIANTS, backdrop
from training.demo.language import COLOURS, SHAPES
from training.demo.scenes import GRID, IMAGE_SIZE, SIDES, Scene, SceneObject

SIZE = "large"
_SHRINKING = 4  # by which pictures are compared
_CORNER = (IMAGE_SIZE - SIDES[SIZE]) // 2
_CORNERS = (_CORNER - GRID, _CORNER, _CORNER + GRID)


def in_the_center(thing: str, background: str, colour: str | None = None) -> Scene:
    """A scene of one large thing in the middle."""
    placed = SceneObject(thing, colour, _CORNER, _CORNER, SIDES[SIZE])
    return Scene(background, (placed,), SIZE, "center", 0)


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
    rows = np.stack([_shrunk(picture / np.float32(255)).ravel() for picture in pictures])
    distances = (drawn**2).sum(1) - 2 * rows @ drawn.T  # and a square that all of a row share
    return [names[int(place)] for place in distances.argmin(axis=1)]


@cache
def _everything(background: str, source: Source) -> tuple[list[str], NDArray[np.float32]]:
    looks = [_shrunk(backdrop(background, look) / np.float32(255)) for look in range(NUM_VARIANTS)]
    things: list[tuple[str, str | None]] = [(thing, None) for thing in (*THINGS, SUBJECT)]
    things += [(shape, colour) for shape in SHAPES for colour in COLOURS if colour != background]
    names, drawn = [], []
    for thing, colour in things:
        placed = SceneObject(thing, colour, _CORNER, _CORNER, SIDES[SIZE])
        sprite = _shrunk(sprite_of(placed, source.drawings()))
        for look in looks:
            for x in _CORNERS:
                for y in _CORNERS:
                    names.append(thing if colour is None else f"{colour} {thing}")
                    drawn.append(_put(sprite, look, x // _SHRINKING, y // _SHRINKING).ravel())
    return names, np.stack(drawn)


def _put(
    sprite: NDArray[np.float32], look: NDArray[np.float32], x: int, y: int
) -> NDArray[np.float32]:
    """A sprite on a background that hardly changes from pixel to pixel."""
    picture = look.copy()
    box = picture[y : y + len(sprite), x : x + len(sprite)]
    box *= 1 - sprite[..., 3:]
    box += sprite[..., :3]
    return picture


def _shrunk(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """Float32 [H, W, C] to [H / 4, W / 4, C], by the mean."""
    height, width, channels = picture.shape
    cells = picture.reshape(
        height // _SHRINKING, _SHRINKING, width // _SHRINKING, _SHRINKING, channels
    )
    mean: NDArray[np.float32] = cells.mean(axis=(1, 3), dtype=np.float32)
    return mean
