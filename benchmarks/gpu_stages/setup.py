"""Setup as a server's: a fresh process opens the engine with default settings."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from gpu_stages import model
from gpu_stages.scene import Scene


def run(scene: Scene) -> dict[str, Any]:
    """Seconds of its parts, and what its log says of what was chosen."""
    folder = model.settled(scene)
    # By its module's name: as a file, its folder would come first on the path, and the stages'
    # names before those of packages.
    command = [sys.executable, "-P", "-m", "gpu_stages.fresh_start", str(folder), scene.device]
    command.append(str(time.monotonic()))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    parts = ("imports_s", "load_s", "warm_up_s", "first_image_s", "total_s")
    return {"headline": ", ".join(f"{part} {result[part]}" for part in parts), **result}
