"""What a visitor made: the pictures as files, and the inputs that each came from."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.page.answers import Answer

MAX_PICTURES = 100
_MOST_OF_A_PROMPT = 48
_ALONE = {"num_outputs": 1}


@dataclass(frozen=True)
class Picture:
    """One file, with the seed that makes it again."""

    path: Path
    seed: int | None


@dataclass(frozen=True)
class Run:
    """One request that gave pictures.

    Attributes:
        values: the form's values, without secrets.
        pictures: those that came, in their order.
        answer: the server's.
    """

    values: Mapping[str, Any]
    pictures: list[Picture]
    answer: Answer

    def values_of(self, picture: Picture) -> dict[str, Any]:
        """The form's values that make a picture again, alone."""
        again = dict(self.values)
        if picture.seed is not None:
            again |= {name: value for name, value in _ALONE.items() if name in again}
            again |= {"seed": picture.seed} if "seed" in again else {}
        return again


class Session:
    """One visitor's runs, newest first, with their files in a folder of their own.

    Attributes:
        runs: those whose files are still there: at most MAX_PICTURES, and the newest.
        shown: the run on show, and which of its pictures is chosen; None before the first.
        wanted: the id of the prediction under way; None where there is none, or it was cancelled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.runs: list[Run] = []
        self.shown: tuple[Run, int] | None = None
        self.wanted: str | None = None

    def add(self, values: Mapping[str, Any], answer: Answer) -> Run:
        """Keep an answer's pictures, show them, and let the oldest go where there are too many."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        seeds = kept_seeds(answer)
        pictures = []
        for index, (content, suffix) in enumerate(answer.pictures):
            path = folder / f"{file_stem(values, index, seeds[index])}{suffix}"
            path.write_bytes(content)
            pictures.append(Picture(path, seeds[index]))
        run = Run(values, pictures, answer)
        self.runs.insert(0, run)
        self.shown = (run, 0)
        while len(self.runs) > 1 and len(self.pictures) > MAX_PICTURES:
            shutil.rmtree(self.runs.pop().pictures[0].path.parent)
        return run

    @property
    def pictures(self) -> list[tuple[Run, int]]:
        """Every picture, as its run and its place in it, newest run first."""
        return [(run, index) for run in self.runs for index in range(len(run.pictures))]

    @property
    def chosen(self) -> Picture | None:
        """The picture that is chosen among those on show."""
        if self.shown is None:
            return None
        run, index = self.shown
        return run.pictures[index]

    def close(self) -> None:
        """Delete all files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def kept_seeds(answer: Answer) -> list[int | None]:
    """The seed of each picture that came: withheld ones have a seed and no picture."""
    seeds = answer.metrics.get("seeds") or []
    withheld = answer.metrics.get("withheld") or []
    kept: list[int | None] = [seed for i, seed in enumerate(seeds) if i not in withheld]
    known = len(kept) == len(answer.pictures)
    return kept if known else [None] * len(answer.pictures)


def file_stem(values: Mapping[str, Any], index: int, seed: int | None) -> str:
    """A name that tells a saved picture from the next one."""
    words = re.sub(r"[^a-z0-9]+", "-", str(values.get("prompt") or "").lower())
    start = words[:_MOST_OF_A_PROMPT].strip("-") or "picture"
    return f"{start}_{index}" if seed is None else f"{start}_seed-{seed}"
