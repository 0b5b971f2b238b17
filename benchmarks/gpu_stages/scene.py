"""What all stages of a run share: where it lies, and whether it is dry. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Scene:
    """One run.

    Attributes:
        out: gets a file of JSON and a log of each stage.
        scratch: for what only the run needs; the parent removes it.
        dry: on the CPU, with a tiny model and few repeats, to prove the run and not the machine.
    """

    out: Path
    scratch: Path
    dry: bool

    @property
    def device(self) -> str:
        """As torch calls it."""
        return "cpu" if self.dry else "cuda"

    @property
    def dtype(self) -> str:
        """The models', as torch calls it."""
        return "float32" if self.dry else "float16"

    def pick(self, real: Choice, dry: Choice) -> Choice:
        """The one that this run takes."""
        return dry if self.dry else real


@dataclass(frozen=True)
class Stage:
    """One row of the run's table.

    Attributes:
        name: of its file, DIR/name.json.
        module: its run(scene, **arguments) is the stage. What it returns is written; a "problem"
            in it that is not None fails the run, and its figures are kept.
        usual_s: what it takes on an H100 or so; where less is left, it is not begun.
        limit_s: after which its process is killed.
        arguments: of run, beside the scene.
    """

    name: str
    module: str
    usual_s: float
    limit_s: float
    arguments: Mapping[str, Any]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is never seen half-written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)
