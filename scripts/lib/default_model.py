"""Which model a checkout runs when nobody names one, and saying which that is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from cog_config import container_environment

from dmd2.settings import ROOT
from dmd2.store.manifest import quick_problems


def choose_model(asked: str | None, environ: Mapping[str, str]) -> str:
    """What DMD2_MODEL becomes: asked, environ's, the container's, else the bundled demo.

    A model's folder given by a relative path is made absolute, since the server runs elsewhere.
    """
    asked = asked or environ.get("DMD2_MODEL")
    if asked:
        is_folder = (Path(asked) / "model_index.json").is_file()
        return str(Path(asked).resolve()) if is_folder else asked
    preferred = container_environment()["DMD2_MODEL"]
    weights_dir = Path(environ.get("DMD2_WEIGHTS_DIR", ROOT / "weights"))
    if not quick_problems(weights_dir / preferred):
        return preferred
    print(
        f"dmd2-cog: the weights of {preferred} are not installed: using the bundled demo model, "
        "which draws animals, food, vehicles and the like as emoji, and nothing else. "
        f"`scripts/download-weights {preferred}` fetches the real one",
        file=sys.stderr,
        flush=True,
    )
    return "demo"
