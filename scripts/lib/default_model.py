"""Which model a checkout runs when nobody names one, and saying which that is."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from cog_server import container_environment

from dmd2.settings import ROOT
from dmd2.weights import quick_problems

DEMO = ROOT / "weights" / "demo"
RANDOM = ROOT / "weights" / "random-tiny"


def choose_model(asked: str | None, environ: Mapping[str, str]) -> str:
    """What DMD2_MODEL becomes: asked, environ's, the container's, else a stand-in.

    A folder given by a relative path is made absolute, since the server runs elsewhere.
    """
    asked = asked or environ.get("DMD2_MODEL")
    if asked:
        return str(Path(asked).resolve()) if Path(asked).is_dir() else asked
    preferred = container_environment()["DMD2_MODEL"]
    weights_dir = Path(environ.get("DMD2_WEIGHTS_DIR", ROOT / "weights"))
    if not quick_problems(weights_dir / preferred):
        return preferred
    advice = f"`scripts/download-weights {preferred}` fetches the real one"
    if not quick_problems(DEMO):
        _say(
            f"the weights of {preferred} are not installed: using the bundled demo model. {advice}"
        )
        return str(DEMO)
    _say(
        f"the weights of {preferred} are not installed: using a tiny model with random weights, "
        f"whose images are noise and do not follow the prompt. {advice}"
    )
    _make_random_model()
    return str(RANDOM)


def _make_random_model() -> None:
    if RANDOM.is_dir():
        return
    from random_model import write_random_model

    partial = RANDOM.with_name(f"{RANDOM.name}.{os.getpid()}")
    write_random_model(partial)
    try:
        partial.rename(RANDOM)
    except OSError:  # another process was first
        shutil.rmtree(partial)


def _say(line: str) -> None:
    print(f"dmd2-cog: {line}", file=sys.stderr, flush=True)
