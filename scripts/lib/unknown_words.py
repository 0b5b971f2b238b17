"""Naming the words of a prompt that the bundled demo was not taught."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection

from dmd2.settings import ROOT
from dmd2.store.manifest import Manifest
from dmd2.store.provision import is_shipped

WORDS_FILE = ROOT / "weights" / "demo" / "words.txt"


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
    """The words of a prompt that are not known, in lower case, each once, in their order."""
    words = re.findall(r"[^\W_]+", re.sub(r"['\u2019]s\b", "", prompt.lower()))
    return [word for word in dict.fromkeys(words) if word not in known]
