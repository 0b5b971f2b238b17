"""Pictures of the demo's world back to words, and whether they show what was asked for.

What differs from the background is an object, and the outline that fits it best its shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from PIL.Image import Resampling, Transform
from scipy import ndimage

from training.demo import scenes
from training.demo.drawing import LANDSCAPE_RGB, RGB, coverage, face_coverage
from training.demo.scenes import IMAGE_SIZE, SHAPES, SMILING_SHAPES, Scene, SceneObject

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]

_HORIZON_REACH = 10  # rows between a wavy horizon and the line that joins its ends, at most
_CONTRAST = 7.0  # from the background, at which an object begins; white on the sea's sky has 20
_FAR_COLOUR = 30.0  # from every background there is: then it is none of them
_MIN_AREA = 80  # pixels; anything smaller is a speck, the smallest object has 230
_MIN_FIT = 0.6  # below, an object has none of the shapes; one read from a drawing has 0.8
_SMILE, _FACE_LIGHTNESS = 0.25, 19.0  # how much darker than the rest, of what a face's is
_OFF_CENTRE = 10.4  # pixels: half way between where "center" ends and the others begin
_MIDDLE = IMAGE_SIZE / 2
_SIZE, _REACH = (48, 48), 1.4  # of a template: pixels, and roots of its area from the middle
_LOOKS = ("shape", "colour", "size", "smiling")
_WAYS = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
_PLAIN_RGB = {name: (rgb, rgb) for name, rgb in RGB.items()}


@dataclass(frozen=True)
class SeenObject:
    """One thing in a picture: its nearest shape, colour and size, whether it has a face, place and
    radius in pixels as in a SceneObject, and as its fit the IoU with the best outline, 0..1.
    """

    shape: str
    colour: str
    size: str
    smiling: bool
    x: float
    y: float
    radius: float
    fit: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows: one of BACKGROUNDS or None, and objects, the largest first."""

    background: str | None
    objects: tuple[SeenObject, ...]


def read(image: NDArray[np.uint8]) -> Reading:
    """Read a picture, uint8 [128, 128, 3]."""
    colours = _opponent(np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7))))
    backdrop = _backdrop(colours)
    ends = np.stack([np.median(part, axis=(0, 1)) for part in (backdrop[:60], backdrop[-30:])])
    background, distance = _nearest(ends, _PLAIN_RGB | LANDSCAPE_RGB)
    covers = _covers(colours, backdrop)
    objects = tuple(_identify(colours, cover, is_alone=len(covers) == 1) for cover in covers)
    return Reading(background if distance < _FAR_COLOUR else None, objects)


def score(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Whether a picture shows a scene, attribute by attribute.

    Always "background" and "count". Of one object, for which the largest seen is taken, "shape",
    "colour", "size", "smiling", and "position" if the scene has one; of two "shapes", "colours",
    "sizes" and "relation". What belongs to an object that was not found is False.
    """
    things = scene.objects
    objects = reading.objects if len(things) == 2 else reading.objects[:1]
    # Of two, those most alike in shape and colour, and only then in size.
    choices = [(s, list(map(_compare, s, things))) for s in permutations(objects, len(things))]
    seen, compared = max(choices, key=lambda choice: _agreement(choice[1]), default=((), []))
    is_right = {"background": reading.background == scene.background}
    is_right["count"] = len(reading.objects) == len(things)
    if scene.relation is not None:
        is_right |= {f"{n}s": bool(seen) and all(c[n] for c in compared) for n in _LOOKS[:3]}
        is_right["relation"] = bool(seen) and _lies(seen[0], scene.relation, seen[1].x, seen[1].y)
    else:
        is_right |= {n: any(c[n] for c in compared) for n in _LOOKS}
    if scene.position is not None:
        is_right["position"] = any(_lies(s, scene.position, _MIDDLE, _MIDDLE) for s in seen)
    return is_right


def _agreement(compared: Sequence[Mapping[str, bool]]) -> float:
    return sum(c["shape"] + c["colour"] + c["size"] / 4 for c in compared)


def _compare(seen: SeenObject, thing: SceneObject) -> dict[str, bool]:
    is_right = {name: getattr(seen, name) == getattr(thing, name) for name in _LOOKS}
    is_right["shape"] &= seen.fit >= _MIN_FIT
    return is_right


def _lies(seen: SeenObject, where: str, x: float, y: float) -> bool:
    """Whether an object is clearly there from a point, or for "center" close to it."""
    dx, dy = seen.x - x, seen.y - y
    if where == "center":
        return max(abs(dx), abs(dy)) < _OFF_CENTRE
    ways = {"left": (-dx, dy), "right": (dx, dy), "top": (-dy, dx), "bottom": (dy, dx)}
    along, across = ways[_WAYS.get(where, where)]
    return along > max(_OFF_CENTRE, 1.2 * abs(across))


def _opponent(rgb: NDArray[np.uint8]) -> Pixels:
    """Colours [..., 3] as lightness, red against green and yellow against blue, in 0..128."""
    # CIELAB swells the faint noise of dark and saturated colours to the size of white on sky.
    to_opponent = np.array([(1, 3, 1.5), (1, -3, 1.5), (1, 0, -3)]) / 6
    return np.asarray(rgb @ to_opponent, np.float32)


def _backdrop(colours: Pixels) -> Pixels:
    """What would be seen without objects, by the colours of the left and right edges.

    They are medians over rows too, and so pass over a corner that touches one. The horizon need
    not be straight: a pixel takes the likest of the colours some rows above to some below.
    """
    padded = np.pad(colours, ((7, 7), (0, 0), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 15, axis=0)
    strips = windows[:, :4], windows[:, -4:]
    left, right = (np.median(strip, axis=(1, 3))[:, None] for strip in strips)
    across = np.linspace(0, 1, IMAGE_SIZE, dtype=np.float32)[:, None]
    straight, rows = left + across * (right - left), np.arange(IMAGE_SIZE)
    above = straight[np.maximum(rows - _HORIZON_REACH, 0)]
    change = straight[np.minimum(rows + _HORIZON_REACH, IMAGE_SIZE - 1)] - above
    share = np.clip(_share(colours - above, change), -0.15, 1.15)
    return np.asarray(above + share[..., None] * change)


def _share(vectors: Pixels, whole: Pixels) -> Pixels:
    """How far along another vector each one reaches: [..., 3] and [..., 3] to [...]."""
    return np.asarray((vectors * whole).sum(axis=-1) / np.maximum((whole**2).sum(axis=-1), 1e-3))


def _nearest(seen: Pixels, rgbs: Mapping[str, Sequence[Sequence[int]]]) -> tuple[str, float]:
    """The name that is nearest to one colour, or to two, [2, 3], and how far it is."""
    palette = _opponent(np.array(list(rgbs.values()), np.uint8))
    distances = np.linalg.norm(palette - seen, axis=-1).mean(axis=-1)
    return list(rgbs)[int(distances.argmin())], float(distances.min())


def _grow(mask: Mask, by: int) -> Mask:
    """Move a mask's outline by some pixels, outwards or, if negative, inwards."""
    if by < 0:
        return ~_grow(~mask, -by)
    square = np.ones((3, 3), bool)
    return np.asarray(ndimage.binary_dilation(mask, square, iterations=by))


def _components(mask: Mask) -> list[Mask]:
    """The parts of a mask whose pixels hang together by their sides."""
    labels, num_parts = ndimage.label(mask)
    return [labels == number for number in range(1, num_parts + 1)]


def _covers(colours: Pixels, backdrop: Pixels) -> list[Pixels]:
    """How much of each pixel every object's colour covers, 0..1; the largest object first."""
    contrast = np.linalg.norm(colours - backdrop, axis=-1)
    least = max(_CONTRAST, 3 * float(np.median(contrast)))
    covers, masks = [], [contrast > least]
    while masks:
        for seed in _components(_grow(_grow(masks.pop(), -2), 2)):
            if seed.sum() < _MIN_AREA or np.median(contrast[seed]) < 1.5 * least:
                continue
            colour = np.median(colours[_grow(seed, -2)], axis=0)
            cover = np.clip(2 * _share(colours - backdrop, colour - backdrop) - 0.5, 0, 1)
            parts = _components((cover > 0.5) & _grow(seed, 5))
            bodies = [part for part in parts if (part & seed).sum() >= _MIN_AREA]
            covers += [np.asarray(cover * _grow(body, 1), np.float32) for body in bodies]
            # Two objects may touch: what this colour left over is looked at by itself.
            masks += [seed & ~_grow(np.any(bodies, axis=0), 4)] if bodies else []
    return sorted(covers, key=np.sum, reverse=True)


def _identify(colours: Pixels, cover: Pixels, *, is_alone: bool) -> SeenObject:
    mask, scale, x, y = _normalise(cover)
    outlines, masks = _templates()
    fits = np.minimum(masks, mask).sum(axis=(1, 2)) / np.maximum(masks, mask).sum(axis=(1, 2))
    outline = outlines[int(fits.argmax())]
    radius = outline.radius * scale
    x, y = x - outline.x * radius, y - outline.y * radius
    inside = cover > 0.75 * cover.max()
    colour, _ = _nearest(np.median(colours[inside], axis=0), _PLAIN_RGB)
    radii = scenes.RADII_ALONE if is_alone else scenes.RADII_IN_PAIR
    size = min(radii, key=lambda name: max(radii[name][0] - radius, radius - radii[name][1]))
    pose = replace(outline, x=x, y=y, radius=radius)
    faces = [replace(pose, angle=pose.angle + turn) for turn in (-8, 0, 8)]
    smiling = any(_smiles(colours[..., 0], inside, face) for face in faces)
    return SeenObject(outline.shape, colour, size, smiling, x, y, radius, float(fits.max()))


def _smiles(lightness: Pixels, inside: Mask, thing: SceneObject) -> bool:
    """Whether eyes and mouth, give or take two pixels, are dark where this face has them."""
    usual = float(np.median(lightness[inside]))
    if thing.shape not in SMILING_SHAPES or thing.radius < 13 or usual < 2 * _FACE_LIGHTNESS:
        return False
    face = face_coverage(thing) > 0.3
    parts = _components(face)
    darkness = np.clip((usual - lightness) / (usual - _FACE_LIGHTNESS), 0, 1)
    moved = [np.roll(darkness, (dy, dx), (0, 1)) for dy in (-2, 0, 2) for dx in (-2, 0, 2)]
    lightest = max(min((float(m[part].mean()) for part in parts), default=0) for m in moved)
    return lightest - float(darkness[inside & ~_grow(face, 2)].mean()) > _SMILE


def _normalise(cover: Pixels) -> tuple[Pixels, float, float, float]:
    """Bring a cover to the templates' scale and middle; also its root of area and centroid."""
    scale = float(np.sqrt(cover.sum()))
    places = np.arange(IMAGE_SIZE) + 0.5
    x, y = (float(np.average(places, weights=cover.sum(axis=axis))) for axis in (0, 1))
    reach = _REACH * scale
    extent = (x - reach, y - reach, x + reach, y + reach)
    mask = Image.fromarray(cover).transform(_SIZE, Transform.EXTENT, extent, Resampling.BILINEAR)
    return np.asarray(mask), scale, x, y


@cache
def _templates() -> tuple[list[SceneObject], Pixels]:
    """Outlines and their masks, float32 [n, 48, 48]: radii are for a root of area of 1, x and y
    the way from centre to centroid for a radius of 1.
    """
    outlines, masks = [], []
    for shape in SHAPES:
        for angle in (0,) if shape in ("circle", "ring") else range(-20, 21, 4):
            thing = SceneObject(shape, "", "", False, _MIDDLE, _MIDDLE, 40.0, angle)
            mask, scale, x, y = _normalise(coverage(thing))
            x, y = (x - _MIDDLE) / 40, (y - _MIDDLE) / 40
            outlines.append(replace(thing, x=x, y=y, radius=40 / scale))
            masks.append(mask)
    return outlines, np.stack(masks)
