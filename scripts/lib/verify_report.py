"""scripts/verify's report: a file that is whole after each row."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from verify_pictures import give_back_memory

from dmd2 import __version__
from dmd2.errors import DeviceMemoryError
from dmd2.settings import ROOT

Row = dict[str, Any]
_MUST_FIT = (
    "stock diffusers had memory enough: end what else uses the device, or leave this precision out "
    "by --precisions"
)


@dataclass
class Report:
    """What is known so far, in a file that is whole after each row."""

    path: Path
    model: str
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Say a row, and write all of them."""
        self.rows.append(row)
        told = (f"{key} {value}" for key, value in row.items() if key not in ("row", "pictures"))
        print(f"{row['row']:28}", ", ".join(told), flush=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        content = {**facts(), "model": self.model, "failed": self.failed, "rows": self.rows}
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.rename(self.path)

    def measure(self, name: str, run: Callable[[], Row], must_fit: bool = False) -> Row:
        """Add what run measures, or why it could not.

        Out of memory is no failure, but where must_fit says that others had enough of it.
        """
        started = time.perf_counter()
        try:
            row = run()
        except (DeviceMemoryError, torch.OutOfMemoryError) as error:
            row = {"passed": None, "error": f"out of memory: {error}".partition("\n")[0]}
            if must_fit:
                row |= {"passed": False, "problem": _MUST_FIT}
        except Exception as error:  # the other rows count all the same
            row = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        give_back_memory()
        self.add({"row": name, **row, "seconds": round(time.perf_counter() - started, 1)})
        return row

    @property
    def failed(self) -> list[str]:
        """The rows that are not as they must be."""
        return [row["row"] for row in self.rows if row["passed"] is False]


def facts() -> Row:
    """What the report was measured on, when, and by which code."""
    is_cuda = torch.cuda.is_available()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # there is no git in the container
        commit = None
    return {
        "report": "verify",
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "command": " ".join(sys.argv),
        "commit": commit,
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU ({platform.machine()})",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "versions": {
            "dmd2": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
