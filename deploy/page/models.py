"""What the page can say of a model: prompts that suit it, and which words it knows."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from unknown_words import WORDS_FILE, unknown_words

DEMO = (
    "a fox in the snow",
    "a rocket in space",
    "a castle at night",
    "a strawberry on a blue background",
)
SDXL = (
    "A small fox asleep in fresh snow under a birch tree, first morning light, long shadows",
    "A steampunk airship of brass and canvas drifting over a foggy Victorian city",
    "Portrait of an old fisherman with a white beard and a yellow oilskin, rain, soft light",
    "The wreck of a pirate ship overgrown with coral, sunbeams from above, silver fish",
)


def is_demo(model: str) -> bool:
    """Whether a server's model is one of those that the repository brings along."""
    return model == "demo" or model.startswith("demo-")


def examples_for(model: str) -> tuple[str, ...]:
    """Prompts to begin with."""
    return DEMO if is_demo(model) else SDXL


def known_words(model: str, words_file: Path = WORDS_FILE) -> list[str]:
    """The words that a demo was taught; none of another model, which knows far too many."""
    return words_file.read_text(encoding="utf-8").split() if is_demo(model) else []


def remark_on(prompt: str, words: Collection[str]) -> str:
    """What is to say of a prompt's words; "" where all are known or nobody knows which are."""
    unknown = unknown_words(prompt, words) if words else []
    if not unknown:
        return ""
    return f"This model was not taught, and passes over: {', '.join(unknown)}"
