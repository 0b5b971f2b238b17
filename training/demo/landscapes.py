"""What is behind things: plain colours in soft light, and landscapes. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from training.demo.scenes import IMAGE_SIZE

NUM_VARIANTS = 4  # few enough for a small network to learn each

RGB = {
    "red": (232, 70, 66),
    "orange": (255, 150, 62),
    "yellow": (255, 214, 80),
    "green": (88, 190, 106),
    "blue": (66, 138, 240),
    "purple": (146, 100, 214),
    "pink": (255, 158, 198),
    "white": (247, 248, 250),
    "black": (32, 32, 40),
}
_Picture = NDArray[np.float32]
_RGB = tuple[int, int, int]

_Y, _X = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) / IMAGE_SIZE
# Where a plain colour's light stands, from the left and from the top, and how strong it is.
_LIGHTS = ((0.5, 0.45, 0.5), (0.15, 0.1, 0.7), (0.85, 0.1, 0.7), (0.5, 0.0, 0.7))


def backdrop(background: str, look: int) -> _Picture:
    """A background, float32 [128, 128, 3] in 0..255, shared: not to be written to.

    Args:
        background: of language.BACKGROUNDS.
        look: chooses one of its NUM_VARIANTS.
    """
    return _backdrop(background, look % NUM_VARIANTS)


@cache
def _backdrop(background: str, variant: int) -> _Picture:
    if background in RGB:
        picture = _plain(RGB[background], *_LIGHTS[variant])
    else:
        picture = _LANDSCAPES[background](variant)
    picture = np.clip(picture, 0, 255).astype(np.float32)
    picture.setflags(write=False)
    return picture


def _plain(rgb: _RGB, x: float, y: float, strength: float) -> _Picture:
    """A colour that is lighter where a lamp shines on it, and darker far from there."""
    distance = np.hypot(_X - x, _Y - y)[..., None]
    light = np.clip(1 - distance, -0.4, 1)
    colour = np.array(rgb, np.float32)
    picture: _Picture = colour + strength * (light - 0.5) * (0.12 * colour + 22)
    return picture


def _meadow(variant: int) -> _Picture:
    picture = _gradient((96, 180, 246), (214, 238, 252))
    for x, y, size in _CLOUDS[variant]:
        _cloud(picture, x, y, size)
    ridge = (0.60, 0.62, 0.58, 0.61)[variant]
    _lay(picture, _hill(ridge, 0.05, 0.9, 0.3 * variant), (142, 206, 120), (120, 192, 104))
    _lay(picture, _hill(ridge + 0.08, 0.035, 1.1, 0.45 + 0.37 * variant), *_GRASS)
    return picture


def _sea(variant: int) -> _Picture:
    picture = _gradient((108, 184, 244), (250, 232, 214), until=0.56)
    for x, y, size in _CLOUDS[3 - variant]:
        _cloud(picture, x, y, size)
    _lay(picture, np.full(IMAGE_SIZE, 0.56), (64, 168, 220), (14, 72, 148))
    for number, height in enumerate((0.64, 0.74, 0.87)):
        start = 0.25 * variant + 0.4 * number
        crest = _hill(height, 0.012 + 0.004 * number, 2.6 - 0.5 * number, start)
        _lay(picture, crest, (38 - 8 * number, 132 - 22 * number, 204 - 18 * number), None)
    return picture


def _desert(variant: int) -> _Picture:
    picture = _gradient((255, 186, 130), (255, 236, 198))
    start = 0.28 * variant
    _lay(picture, _hill(0.60, 0.05, 0.8, start), (240, 190, 124), (232, 176, 108))
    _lay(picture, _hill(0.68, 0.06, 0.7, start + 0.45), (230, 170, 98), (222, 158, 86))
    _lay(picture, _hill(0.80, 0.05, 0.6, start + 0.15), (218, 150, 78), (200, 130, 62))
    return picture


def _snow(variant: int) -> _Picture:
    picture = _gradient((112, 160, 214), (206, 226, 244))
    start = 0.31 * variant
    _lay(picture, _hill(0.58, 0.06, 0.8, start), (186, 210, 234), (198, 218, 238))
    _lay(picture, _hill(0.66, 0.04, 0.9, start + 0.5), (222, 234, 246), (232, 241, 250))
    _lay(picture, _hill(0.80, 0.03, 0.7, start + 0.2), (240, 246, 252), (252, 253, 255))
    return picture


def _night(variant: int) -> _Picture:
    picture = _gradient((16, 16, 58), (74, 60, 130), until=0.8)
    rng = np.random.default_rng(variant)
    for x, y in _apart(rng, num=14, below=0.62, distance=0.13):
        _glow(picture, x, y, rng.uniform(0.009, 0.014), (255, 250, 220), 1.0)
    _glow(picture, (0.2, 0.8, 0.35, 0.65)[variant], 0.1, 0.3, (150, 150, 230), 0.35)
    _lay(picture, _hill(0.74, 0.05, 0.8, 0.3 * variant), (44, 44, 92), (36, 38, 80))
    _lay(picture, _hill(0.84, 0.04, 0.7, 0.5 + 0.3 * variant), (24, 28, 62), (14, 18, 44))
    return picture


_GRASS: tuple[_RGB, _RGB] = ((112, 190, 84), (66, 150, 62))
# From the left, from the top, width.
_CLOUDS = (
    ((0.20, 0.20, 0.17), (0.78, 0.32, 0.13)),
    ((0.80, 0.16, 0.18),),
    ((0.14, 0.30, 0.14), (0.60, 0.14, 0.16)),
    ((0.30, 0.14, 0.15), (0.90, 0.28, 0.15)),
)
_LANDSCAPES = {
    "meadow": _meadow,
    "sea": _sea,
    "desert": _desert,
    "snow": _snow,
    "night": _night,
}


def _gradient(top: _RGB, bottom: _RGB, until: float = 0.64) -> _Picture:
    """A sky, float32 [128, 128, 3]."""
    depth = np.clip(_Y / until, 0, 1)[..., None]
    sky: _Picture = np.array(top, np.float32) * (1 - depth) + np.array(bottom, np.float32) * depth
    return sky


def _hill(height: float, swing: float, waves: float, start: float) -> NDArray[np.float64]:
    """A soft line across the picture: the share from the top at each of its columns."""
    phase = 2 * np.pi * (waves * np.arange(IMAGE_SIZE) / IMAGE_SIZE + start)
    line: NDArray[np.float64] = height + swing * np.sin(phase)
    return line


def _lay(picture: _Picture, line: NDArray[np.float64], near: _RGB, far: _RGB | None) -> None:
    """Cover what is below a line: near in colour at the line, far at the picture's bottom."""
    depth = (_Y - line[None, :].astype(np.float32))[..., None]
    cover = np.clip(depth * IMAGE_SIZE + 0.5, 0, 1)
    top = float(line.min())
    fade = np.clip((_Y[..., None] - top) / (1 - top), 0, 1)
    colour = np.array(near, np.float32)
    if far is not None:
        colour = colour * (1 - fade) + np.array(far, np.float32) * fade
    picture += cover * (colour - picture)


def _cloud(picture: _Picture, x: float, y: float, size: float) -> None:
    """Three round puffs over a flat foot."""
    inside = np.zeros_like(_X)
    for dx, radius in ((-0.5, 0.30), (0.0, 0.46), (0.5, 0.26)):
        edge = size * radius - np.hypot(_X - x - size * dx, _Y - y + size * (radius - 0.3))
        inside = np.maximum(inside, np.clip(edge * IMAGE_SIZE + 0.5, 0, 1))
    foot = np.clip((y + 0.26 * size - _Y) * IMAGE_SIZE + 0.5, 0, 1)
    picture += (0.75 * inside * foot)[..., None] * (255 - picture)


def _glow(picture: _Picture, x: float, y: float, radius: float, rgb: _RGB, share: float) -> None:
    distance = np.hypot(_X - x, _Y - y) / radius
    cover = (share * np.exp(-(distance**2) / 2))[..., None]
    picture += cover * (np.array(rgb, np.float32) - picture)


def _apart(
    rng: np.random.Generator, num: int, below: float, distance: float
) -> Sequence[tuple[float, float]]:
    """Places in the upper part of the picture that keep a distance from one another."""
    places: list[tuple[float, float]] = []
    while len(places) < num:
        x, y = float(rng.uniform(0.03, 0.97)), float(rng.uniform(0.03, below))
        if all(np.hypot(x - a, y - b) >= distance for a, b in places):
            places.append((x, y))
    return places
