"""Naming the words of a prompt that the bundled demo was not taught."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection

from dmd2.settings import ROOT
from dmd2.store.manifest import Manifest
from dmd2.store.provision import is_shipped

WORDS_FILE = ROOT / "weights" / "demo" / "words.txt"
# Of known words. "left of the picture" is a place, and "under the stars" is the night.
_RELATION = (
    r"\b(?:left|right|top)(?: side)? of\b(?! the (?:picture|image|photo)\b)"
    r"|\bunder\b(?!(?: the)? stars\b)"
)


def remark_on(prompt: str, model: str) -> None:
    """Say on stderr which words a demo model passes over; other models know far too many."""
    if not is_shipped(model, Manifest.read()):
        return
    unknown = unknown_words(prompt, WORDS_FILE.read_text(encoding="utf-8").split())
    if unknown:
        print(
            f"dmd2-cog: {model} passes over what it was not taught: {', '.join(unknown)}. "
            f"Its words are in {WORDS_FILE.relative_to(ROOT)}",
            file=sys.stderr,
            flush=True,
        )


def unknown_words(prompt: str, known: Collection[str]) -> list[str]:
    """What of a prompt is not known, in lower case, each once, in its order: words and relations.

    "left of" is not, though "left" is: the demo knows where one thing is in the picture, and not
    where it is from another.
    """
    text = " ".join(re.sub(r"['\u2019]s\b", "", prompt.lower()).split())
    found = re.finditer(rf"(?P<relation>{_RELATION})|[^\W_]+", text)
    return list(dict.fromkeys(f[0] for f in found if f["relation"] or f[0] not in known))
