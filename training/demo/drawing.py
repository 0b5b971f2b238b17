"""Scenes to pictures: a thing's drawing, or a flat shape, on its background."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training.demo.drawings import Drawings
from training.demo.icons import ICONS
from training.demo.landscapes import backdrop
from training.demo.scenes import Scene, SceneObject

# Fluent Emoji's own tones, so that shapes and things are of one kind.
SHAPE_RGB = {
    "red": (226, 38, 38),
    "orange": (255, 130, 36),
    "yellow": (252, 213, 63),
    "green": (0, 172, 82),
    "blue": (24, 98, 224),
    "purple": (124, 62, 190),
    "pink": (255, 112, 190),
    "white": (252, 252, 252),
    "black": (28, 26, 34),
}
_SUPERSAMPLING = 4
_ROUNDING = 0.16  # the radius of a shape's corners, in halves of its box


def draw(scene: Scene, drawings: Drawings) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 [128, 128, 3]; the same scene gives the same pixels.

    Args:
        scene: what is drawn.
        drawings: of ICONS.
    """
    image = backdrop(scene.background, scene.look).copy()
    for thing in scene.objects:
        sprite = sprite_of(thing, drawings)
        box = image[thing.y : thing.y + thing.side, thing.x : thing.x + thing.side]
        box *= 1 - sprite[..., 3:]
        box += 255 * sprite[..., :3]
    return (image + 0.5).astype(np.uint8)


def sprite_of(thing: SceneObject, drawings: Drawings) -> NDArray[np.float32]:
    """A thing and its coverage, float32 [side, side, 4] in 0..1, colours premultiplied."""
    if thing.colour is not None:
        return _shape(thing.thing, thing.colour, thing.side)
    return drawings.picture(ICONS[thing.thing], thing.side)


@cache
def _shape(shape: str, colour: str, side: int) -> NDArray[np.float32]:
    """A flat shape; where it has corners, they are rounded."""
    size = side * _SUPERSAMPLING
    points = [(size / 2 * (1 + x), size / 2 * (1 + y)) for x, y in _outline(shape)]
    canvas = Image.new("L", (size, size))
    pen = ImageDraw.Draw(canvas)
    pen.polygon(points, fill=255)
    if shape not in ("circle", "heart"):
        radius = _ROUNDING * size / 2
        pen.line([*points, points[0]], fill=255, width=round(2 * radius))
        for x, y in points:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    alpha = np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32)[..., None] / np.float32(255)
    rgb = np.array(SHAPE_RGB[colour], np.float32) / np.float32(255)
    return np.concatenate([alpha * rgb, alpha], axis=2)


def _outline(shape: str) -> NDArray[np.float64]:
    """A shape's outline [n, 2] in -1..1, y downwards; rounding adds to what has corners."""
    turn = np.linspace(0, 2 * np.pi, 192, endpoint=False)
    if shape == "circle":
        return 0.88 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "square":
        return 0.64 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        return np.array([(0, -0.70), (0.80, 0.66), (-0.80, 0.66)])
    if shape == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 0.82, 0.40)
        return np.stack([radii * np.cos(angles), radii * np.sin(angles) + 0.06], axis=1)
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return np.stack([x, -(y + 2.5)], axis=1) / 17.8
    raise ValueError(f"no outline for {shape!r}")
