"""What the engines under test note: a file of JSON lines that all their processes add to."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

# Prompts: one ends the engine's process; one has it hang, once.
DEADLY, STUCK = "a query of death", "a query that hangs"


def note(what: str, id: str = "") -> None:
    """Add a line, whole, whoever else writes."""
    line = {"what": what, "id": id, "pid": os.getpid(), "time": time.time()}
    with Path(os.environ["SCALE_NOTES"]).open("a") as file:
        file.write(json.dumps(line) + "\n")


def notes(path: Path | None = None) -> list[dict[str, Any]]:
    """What all engines have noted."""
    path = path or Path(os.environ["SCALE_NOTES"])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
