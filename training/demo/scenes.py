"""The captioned world of the demo model: scenes, and the small language that tells of them.

A scene is drawn at random from a seed and an index, and so is the caption, which tells a part
of it: what the caption leaves out, the picture is free to choose.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 128

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
SMILING_SHAPES = ("circle", "square", "triangle", "star", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
# A landscape has two colours, and an object that is too like one of them does not stand in it.
LANDSCAPES = {"meadow": ("green",), "sea": ("blue",), "desert": ("orange", "yellow")}
BACKGROUNDS = (*COLOURS, *LANDSCAPES)
SIZES = ("small", "medium", "large")
POSITIONS = ("left", "right", "top", "bottom", "center")
RELATIONS = ("left of", "right of", "above", "below")

# Radii in pixels of an object that is alone, and of one of two.
RADII_ALONE = {"small": (16.0, 19.0), "medium": (25.0, 30.0), "large": (38.0, 45.0)}
RADII_IN_PAIR = {"small": (13.0, 15.5), "medium": (18.5, 22.0), "large": (26.0, 30.0)}
_MARGIN = 7.0  # pixels of background around every object
_GAP = 5.0  # pixels of background between two
_ROOM_IN_PAIR = IMAGE_SIZE - 2 * _MARGIN - _GAP  # for both diameters
_OFF_CENTRE = 13.0  # how far from the middle a "left" begins and a "center" ends

# One combination of shape, colour and background in ten is never shown in training.
_HELD_OUT_SHARE = 0.1
_FILLERS = (
    "nice", "photo", "picture", "beautiful", "detailed", "cute", "simple", "drawing", "please",
    "art", "style", "modern", "old", "happy", "bright", "image", "quality", "lovely",
)  # fmt: skip

# Every word that means something; the demo passes over all others.
WORDS = (
    *SHAPES, *COLOURS, *LANDSCAPES, *SIZES, *POSITIONS, "smiling", "above", "below", "of",
    "a", "an", "the", "on", "in", "at", "over", "background", ",",
)  # fmt: skip


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene.

    Attributes:
        shape, colour, size: of SHAPES, COLOURS and SIZES.
        smiling: whether it has a face.
        x, y: the centre in pixels from the left and from the top.
        radius: in pixels.
        angle: of rotation, in degrees.
    """

    shape: str
    colour: str
    size: str
    smiling: bool
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        background: of BACKGROUNDS.
        objects: one, or two of which the first stands in relation to the second.
        position: of POSITIONS, for one object that stands clearly there; else None.
        relation: of RELATIONS for two objects, else None.
        look: seeds what has no name: shades, light, the horizon.
    """

    background: str
    objects: tuple[SceneObject, ...]
    position: str | None
    relation: str | None
    look: int


@dataclass(frozen=True)
class Described:
    """A scene and what a caption says of it.

    Attributes:
        scene: the whole of it.
        caption: a sentence of the demo's language.
        said: the attributes that the caption tells, as "colour", "size", "background",
            "position", "relation", "smiling"; the shapes are always told.
    """

    scene: Scene
    caption: str
    said: frozenset[str]


def is_held_out(scene: Scene) -> bool:
    """Whether some object's shape, colour and background are kept from training together."""
    return any(_held_out(o.shape, o.colour, scene.background) for o in scene.objects)


def sample(
    seed: int, index: int, *, held_out: bool = False, num_objects: int = 0, telling: int = 0
) -> Described:
    """Scene number index of the data set that a seed stands for.

    Args:
        seed: of the data set.
        index: from 0.
        held_out: draw from the combinations that training never shows, and with a caption
            that names all three attributes of such a combination; else from the others.
        num_objects: 1 or 2; 0 for the mixture of training, where a third has two.
        telling: which of its captions.
    """
    rng = np.random.default_rng([seed, index, int(held_out), num_objects])
    while True:
        wants_two = num_objects == 2 or (num_objects == 0 and rng.random() < 1 / 3)
        scene = _pair(rng) if wants_two else _alone(rng)
        if is_held_out(scene) == held_out:
            teller = np.random.default_rng([scene.look, telling])
            return _describe(teller, scene, is_complete=held_out)


def _alone(rng: np.random.Generator) -> Scene:
    background = str(rng.choice(BACKGROUNDS))
    colour = _colour_on(rng, background)
    shape, size = str(rng.choice(SHAPES)), str(rng.choice(SIZES))
    radius = rng.uniform(*RADII_ALONE[size])
    reach = IMAGE_SIZE / 2 - _MARGIN - radius
    dx, dy = (_offset(rng, reach) for _ in range(2))
    smiling = _may_smile(shape, colour) and size != "small" and rng.random() < 0.25
    thing = SceneObject(
        shape, colour, size, bool(smiling), IMAGE_SIZE / 2 + dx, IMAGE_SIZE / 2 + dy,
        radius, rng.uniform(-14, 14),
    )  # fmt: skip
    return Scene(background, (thing,), _position(dx, dy), None, int(rng.integers(2**31)))


def _pair(rng: np.random.Generator) -> Scene:
    background = str(rng.choice(BACKGROUNDS))
    while True:
        things = [
            (str(rng.choice(SHAPES)), _colour_on(rng, background), str(rng.choice(SIZES)))
            for _ in range(2)
        ]
        radii = [float(rng.uniform(*RADII_IN_PAIR[size])) for _, _, size in things]
        if things[0][:2] != things[1][:2]:
            break
    relation = str(rng.choice(RELATIONS))
    too_large = max(1.0, 2 * sum(radii) / _ROOM_IN_PAIR)
    radii = [radius / too_large for radius in radii]
    along = _two_places(rng, radii)
    across = [IMAGE_SIZE / 2 + float(np.clip(rng.normal(0, 6), -12, 12)) for _ in range(2)]
    if relation in ("right of", "below"):
        along = [IMAGE_SIZE - a for a in along]
    objects = []
    for (shape, colour, size), radius, a, b in zip(things, radii, along, across, strict=True):
        x, y = (a, b) if relation in ("left of", "right of") else (b, a)
        angle = rng.uniform(-14, 14)
        objects.append(SceneObject(shape, colour, size, False, x, y, radius, angle))
    return Scene(background, tuple(objects), None, relation, int(rng.integers(2**31)))


def _two_places(rng: np.random.Generator, radii: list[float]) -> list[float]:
    """Centres along one axis, the first before the second, with what room is left spread."""
    room = max(0.0, _ROOM_IN_PAIR - 2 * sum(radii))
    before, between, _ = rng.dirichlet((2.0, 2.0, 2.0)) * room
    first = _MARGIN + float(before) + radii[0]
    return [first, first + radii[0] + _GAP + float(between) + radii[1]]


def _offset(rng: np.random.Generator, reach: float) -> float:
    """From the middle, in pixels: near it half of the time, else anywhere within reach."""
    offset = rng.normal(0, 4) if rng.random() < 0.5 else rng.uniform(-reach, reach)
    return float(np.clip(offset, -reach, reach))


def _position(dx: float, dy: float) -> str | None:
    """The name of an offset from the middle, where one name is clearly right."""
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if along < _OFF_CENTRE * 0.6:
        return "center"
    if along < _OFF_CENTRE or along < 1.5 * across:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def _colour_on(rng: np.random.Generator, background: str) -> str:
    """A colour that stands out against a background."""
    alike = LANDSCAPES.get(background, (background,))
    return str(rng.choice([colour for colour in COLOURS if colour not in alike]))


def _may_smile(shape: str, colour: str) -> bool:
    return shape in SMILING_SHAPES and colour != "black"


def _held_out(shape: str, colour: str, background: str) -> bool:
    digest = hashlib.sha256(f"{shape}/{colour}/{background}".encode()).digest()
    return digest[0] / 256 < _HELD_OUT_SHARE


def _describe(rng: np.random.Generator, scene: Scene, *, is_complete: bool) -> Described:
    """Put a scene into words; an incomplete caption may leave the colour or background out."""
    said = set()
    if is_complete or rng.random() < 0.92:
        said.add("colour")
    if is_complete or rng.random() < 0.88:
        said.add("background")
    if rng.random() < 0.5:
        said.add("size")
    if any(o.smiling for o in scene.objects):
        said.add("smiling")
    if scene.relation is not None:
        said.add("relation")
    if scene.position is not None and rng.random() < 0.5:
        said.add("position")
    caption = caption_of(scene, frozenset(said))
    if not is_complete:
        caption = _vary(rng, caption)
    return Described(scene, caption, frozenset(said))


def caption_of(scene: Scene, said: frozenset[str]) -> str:
    """The sentence that tells the attributes in said, and the shapes."""
    caption = _noun(scene.objects[0], said)
    if scene.relation is not None:
        caption += f" {scene.relation} {_noun(scene.objects[1], said)}"
    if "background" in said:
        if scene.background in LANDSCAPES:
            caption += f" {'over' if scene.background == 'sea' else 'in'} the {scene.background}"
        else:
            article = "an" if scene.background == "orange" else "a"
            caption += f" on {article} {scene.background} background"
    if "position" in said:
        word = scene.position
        place = f"at the {word}" if word in ("top", "bottom") else f"on the {word}"
        caption += ", in the center" if word == "center" else f", {place}"
    return caption


def _noun(thing: SceneObject, said: frozenset[str]) -> str:
    words = []
    if "size" in said:
        words.append(thing.size)
    if "smiling" in said and thing.smiling:
        words.append("smiling")
    if "colour" in said:
        words.append(thing.colour)
    phrase = " ".join([*words, thing.shape])
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _vary(rng: np.random.Generator, caption: str) -> str:
    """Say it otherwise now and then: without articles, or among words that mean nothing here."""
    if rng.random() < 0.15:
        caption = " ".join(w for w in caption.split() if w not in ("a", "an", "the"))
    if rng.random() < 0.15:
        fillers = [str(w) for w in rng.choice(_FILLERS, size=rng.integers(1, 4))]
        if rng.random() < 0.5:
            return f"{' '.join(fillers)} {'of ' if rng.random() < 0.5 else ''}{caption}"
        return f"{caption}, {', '.join(fillers)}"
    return caption
