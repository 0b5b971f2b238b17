"""The demo's small language: its words, what else people type for them, and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.demo.icons import THINGS

SHAPES = ("circle", "square", "triangle", "star", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
LANDSCAPES = ("meadow", "sea", "desert", "snow", "night")
BACKGROUNDS = (*COLOURS, *LANDSCAPES)
SIZES = ("small", "medium", "large")
POSITIONS = ("left", "right", "top", "bottom", "center")

# What people type, and the word that it stands for.
SYNONYMS = {
    "kitten": "cat", "kitty": "cat", "puppy": "dog", "doggy": "dog", "bunny": "rabbit",
    "hare": "rabbit", "teddy": "bear", "toad": "frog", "piglet": "pig", "ape": "monkey",
    "pony": "horse", "dino": "dinosaur", "duckling": "duck", "bird": "parrot",
    "goldfish": "fish", "tortoise": "turtle", "bumblebee": "bee", "oak": "tree",
    "pine tree": "pine", "fir": "pine", "spruce": "pine", "palm": "palm tree",
    "flower": "tulip", "toadstool": "mushroom", "hamburger": "burger",
    "cheeseburger": "burger", "doughnut": "donut", "birthday cake": "cake",
    "cup of coffee": "coffee", "cup of tea": "coffee", "spaceship": "rocket",
    "boat": "sailboat", "ship": "sailboat", "plane": "airplane", "aeroplane": "airplane",
    "jet": "airplane", "automobile": "car", "locomotive": "train", "bike": "bicycle",
    "ufo": "flying saucer", "sunshine": "sun", "crescent": "moon", "saturn": "planet",
    "home": "house", "cottage": "house", "palace": "castle", "smiley": "smiling face",
    "happy face": "smiling face", "emoji": "smiling face", "face": "smiling face",
    "spirit": "ghost", "android": "robot", "martian": "alien", "gem": "diamond",
    "jewel": "diamond", "parasol": "umbrella", "football": "ball", "soccer ball": "ball",
    "alarm clock": "clock", "lamp": "light bulb", "bulb": "light bulb", "present": "gift",
    "novel": "book", "disc": "circle", "dot": "circle", "violet": "purple",
    "little": "small", "tiny": "small", "big": "large", "huge": "large", "giant": "large",
}  # fmt: skip

# How a place is told: as a rule by the first of its phrases.
PLACES: Mapping[str, tuple[str, ...]] = {
    "meadow": ("on a meadow", "in a meadow", "on the grass", "in a field", "in the garden"),
    "sea": ("on the sea", "at the sea", "in the ocean", "on the water", "at the beach"),
    "desert": ("in the desert", "in a desert", "on the sand", "in the dunes"),
    "snow": ("in the snow", "on snow", "in winter"),
    "night": ("at night", "in the night", "in space", "under the stars", "in the dark"),
    "left": ("on the left", "to the left", "on the left side"),
    "right": ("on the right", "to the right", "on the right side"),
    "top": ("at the top", "on top"),
    "bottom": ("at the bottom",),
    "center": ("in the center", "in the centre", "in the middle"),
}

# Words that mean nothing here: they teach the demo to pass over what it does not know.
_DOINGS = (
    "sitting", "standing", "sleeping", "running", "playing", "dancing", "walking", "looking",
    "waiting", "resting", "floating", "jumping", "living", "eating", "alone", "outside",
)  # fmt: skip
_ADJECTIVES = (
    "beautiful", "cute", "pretty", "nice", "lovely", "funny", "adorable", "friendly", "simple",
    "fluffy", "old", "young", "modern", "new", "shiny", "wonderful", "magical", "lonely",
)  # fmt: skip
_KINDS = (
    "photo", "picture", "image", "drawing", "painting", "illustration", "cartoon", "icon",
    "sticker", "portrait", "sketch", "render", "photograph",
)  # fmt: skip
_STYLES = (
    "digital art", "high quality", "detailed", "very detailed", "masterpiece", "best quality",
    "realistic", "colorful", "colourful", "minimalist", "cinematic", "flat style", "bright",
    "artwork", "vector", "please", "cartoon style", "concept art", "trending", "professional",
)  # fmt: skip

_GLUE = ("a", "an", "the", "on", "in", "at", "and", "of", "background", ",")


def _single(phrases: Iterable[str]) -> tuple[str, ...]:
    """The words of phrases, each once, in their order."""
    return tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


# Every word that means something; the demo passes over all others.
WORDS = _single((
    *THINGS, *SHAPES, *COLOURS, *SIZES, *SYNONYMS,
    *(phrase for phrases in PLACES.values() for phrase in phrases), "in the sky", *_GLUE,
))  # fmt: skip


def known_words() -> list[str]:
    """The words that a prompt may have without a remark, sorted: WORDS and words for nothing."""
    passed_over = _single((*_DOINGS, *_ADJECTIVES, *_KINDS, *_STYLES))
    return sorted({*WORDS, *passed_over} - {","})


@dataclass(frozen=True)
class Teller:
    """Puts names into phrases.

    Attributes:
        rng: chooses among ways to say a thing; None says everything in the plainest way.
    """

    rng: np.random.Generator | None = None

    def noun(self, thing: str, colour: str | None = None, size: str | None = None) -> str:
        """A thing with its article: "a small red circle"."""
        words = [self._word(name) for name in (size, colour, thing) if name is not None]
        if not self._is_plain(0.12):
            words.insert(0, self._any(_ADJECTIVES))
        phrase = " ".join(words)
        return f"{_article(phrase)} {phrase}"

    def place(self, name: str) -> str:
        """Where it is, of BACKGROUNDS or POSITIONS: "on a red background", "on the left"."""
        if name in PLACES:
            phrases = PLACES[name]
        else:
            word = self._word(name)
            phrases = (f"on {_article(word)} {word} background", f"on {word}")
            phrases += ("in the sky",) if name == "blue" else ()
        return phrases[0] if self._is_plain(0.3) else self._any(phrases)

    def sentence(self, nouns: Sequence[str], places: Sequence[str]) -> str:
        """One or two nouns, and where they are; among other words now and then."""
        doing = [] if self._is_plain(0.1) else [self._any(_DOINGS)]
        caption = " ".join([" and ".join(nouns), *doing, *places[:1]])
        if not self._is_plain(0.1):
            kind = self._any(_KINDS)
            caption = f"{_article(kind)} {kind} of {caption}"
        styles = [] if self._is_plain(0.1) else [self._any(_STYLES)]
        caption = ", ".join([caption, *places[1:], *styles])
        if self._is_plain(0.15):
            return caption
        return " ".join(word for word in caption.split() if word not in ("a", "an", "the"))

    def _word(self, name: str) -> str:
        """A name, or what people also type for it."""
        others = [alias for alias, meaning in SYNONYMS.items() if meaning == name]
        return name if not others or self._is_plain(0.25) else self._any(others)

    def _is_plain(self, share_of_others: float) -> bool:
        return self.rng is None or self.rng.random() >= share_of_others

    def _any(self, choices: Sequence[str]) -> str:
        assert self.rng is not None
        return choices[int(self.rng.integers(len(choices)))]


def _article(phrase: str) -> str:
    return "an" if phrase.startswith(("a", "e", "i", "o", "umb")) else "a"
