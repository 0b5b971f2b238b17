"""Scenes to pictures: anti-aliased outlines, soft light, faces. NumPy and Pillow only."""

from __future__ import annotations

import colorsys
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training.demo.scenes import IMAGE_SIZE, LANDSCAPES, Scene, SceneObject

RGB = {
    "red": (218, 42, 42),
    "orange": (246, 140, 28),
    "yellow": (250, 216, 50),
    "green": (52, 168, 78),
    "blue": (45, 95, 220),
    "purple": (138, 62, 190),
    "pink": (250, 142, 190),
    "white": (246, 246, 246),
    "black": (26, 26, 32),
}
# The upper part and the lower part.
LANDSCAPE_RGB = {
    "meadow": ((158, 210, 246), (98, 182, 84)),
    "sea": ((206, 228, 244), (30, 108, 172)),
    "desert": ((252, 222, 176), (222, 164, 88)),
}
_FACE_RGB = np.array((44, 30, 40), np.float32)
_SUPERSAMPLING = 4


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 [128, 128, 3]; the same scene gives the same pixels."""
    rng = np.random.default_rng(scene.look)
    image = _background(rng, scene.background)
    for thing in scene.objects:
        colour = _shade(rng, RGB[thing.colour])
        alpha = coverage(thing)[..., None]
        image += alpha * (colour * _highlight(rng, thing) - image)
        if thing.smiling:
            image += face_coverage(thing)[..., None] * (_FACE_RGB - image)
    picture: NDArray[np.uint8] = np.clip(image + 0.5, 0, 255).astype(np.uint8)
    return picture


def coverage(thing: SceneObject) -> NDArray[np.float32]:
    """How much of each pixel an object covers, float32 [128, 128] in 0..1."""
    outer, holes = _outline(thing.shape)
    return _fill([outer], thing) * (1 - _fill(list(holes), thing) if holes else 1)


@cache
def _outline(shape: str) -> tuple[NDArray[np.float64], tuple[NDArray[np.float64], ...]]:
    """A shape's outline and its holes: points [n, 2] within about a unit circle, y downwards."""
    turn = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    round_ = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "circle":
        return 0.94 * round_, ()
    if shape == "ring":
        return round_, (0.52 * round_,)
    if shape == "moon":
        return _moved(round_, -0.12, 0), (_moved(0.86 * round_, 0.42, 0),)
    if shape == "square":
        return 0.84 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), ()
    if shape == "triangle":
        return np.array([(0, -0.98), (1.04, 0.82), (-1.04, 0.82)]), ()
    if shape == "cross":
        a, b = 1.0, 0.36
        return np.array([
            (-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
            (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b),
        ]), ()  # fmt: skip
    if shape == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.1, 0.5)
        return np.stack([radii * np.cos(angles), radii * np.sin(angles) + 0.08], axis=1), ()
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return np.stack([x / 16.2, -(y + 2.5) / 16.2], axis=1), ()
    raise ValueError(f"no outline for {shape!r}")


def _fill(polygons: list[NDArray[np.float64]], thing: SceneObject) -> NDArray[np.float32]:
    """The pixels within any of the polygons, which are placed as the object is."""
    size = IMAGE_SIZE * _SUPERSAMPLING
    canvas = Image.new("L", (size, size))
    for polygon in polygons:
        points = _place(polygon, thing) * _SUPERSAMPLING - 0.5
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in points], fill=255)
    return np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32) / np.float32(255)


def _place(points: NDArray[np.float64], thing: SceneObject) -> NDArray[np.float64]:
    """Turn, scale and move points of the unit circle to where the object is, in pixels."""
    angle = np.deg2rad(thing.angle)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return _moved(points @ rotation * thing.radius, thing.x, thing.y)


def face_coverage(thing: SceneObject) -> NDArray[np.float32]:
    """How much of each pixel an object's eyes and mouth cover, float32 [128, 128] in 0..1."""
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    eye = np.stack([0.085 * np.cos(turn), 0.13 * np.sin(turn)], axis=1)
    down = {"triangle": 0.3, "star": 0.1}.get(thing.shape, 0.0)
    bend = np.linspace(0.18 * np.pi, 0.82 * np.pi, 16)
    outer = np.stack([0.36 * np.cos(bend), 0.36 * np.sin(bend)], axis=1)
    inner = np.stack([0.36 * np.cos(bend), 0.36 * np.sin(bend) - 0.11], axis=1)
    smile = np.concatenate([outer, inner[::-1]])
    parts = [_moved(eye, -0.24, down - 0.1), _moved(eye, 0.24, down - 0.1)]
    return _fill([*parts, _moved(smile, 0, down + 0.03)], thing)


def _moved(points: NDArray[np.float64], dx: float, dy: float) -> NDArray[np.float64]:
    """The points elsewhere."""
    moved: NDArray[np.float64] = points + np.array((dx, dy))
    return moved


def _background(rng: np.random.Generator, name: str) -> NDArray[np.float32]:
    """A plain colour in soft light, or a landscape with its horizon, float32 [128, 128, 3]."""
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) / (IMAGE_SIZE - 1) - 0.5
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.16)
    light = 1 + strength * (np.cos(angle) * x + np.sin(angle) * y)[..., None]
    if name not in LANDSCAPES:
        plain: NDArray[np.float32] = (_shade(rng, RGB[name]) * light).astype(np.float32)
        return plain
    above, below = (_shade(rng, rgb) for rgb in LANDSCAPE_RGB[name])
    horizon = rng.uniform(0.06, 0.2) + np.zeros_like(x)
    if name != "sea":
        waves, start = rng.uniform(0.6, 1.3), rng.uniform(0, 2 * np.pi)
        horizon += 0.03 * np.sin(2 * np.pi * waves * x + start)
    ground = np.clip((y - horizon) * (IMAGE_SIZE - 1) + 0.5, 0, 1)[..., None]
    view: NDArray[np.float32] = ((above + ground * (below - above)) * light).astype(np.float32)
    return view


def _highlight(rng: np.random.Generator, thing: SceneObject) -> NDArray[np.float32]:
    """The light on an object: brighter towards the upper left, float32 [128, 128, 1]."""
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    strength = rng.uniform(0.05, 0.14)
    along = (thing.x - x + thing.y - y) / (1.5 * thing.radius)
    light: NDArray[np.float32] = (1 + strength * np.clip(along, -1, 1))[..., None]
    return light


def _shade(rng: np.random.Generator, rgb: tuple[int, int, int]) -> NDArray[np.float32]:
    """A colour moved a little in hue, saturation and brightness."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    hue += rng.normal(0, 0.006)
    saturation *= float(np.clip(rng.normal(1, 0.05), 0.85, 1.1))
    value *= float(np.clip(rng.normal(1, 0.04), 0.88, 1.06))
    shaded = colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1))
    return np.array(shaded, np.float32) * 255
