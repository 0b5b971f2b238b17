"""The model that all other stages run: SDXL at full size with random weights, made on the GPU."""

from __future__ import annotations

import fcntl
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from random_model import write_random_model

from gpu_stages.scene import Scene


def run(scene: Scene) -> dict[str, Any]:
    """Make it, for all stages after this one."""
    started = time.perf_counter()
    folder = settled(scene)
    seconds = round(time.perf_counter() - started, 2)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "headline": f"{size / 1e9:.2f} GB in {folder.parent} after {seconds} s",
        "made_s": seconds,
        "size_gb": round(size / 1e9, 3),
        "folder": str(folder),
    }


def settled(scene: Scene) -> Path:
    """The model's folder; it is made where it is missing, so a stage needs no other one.

    On a CPU the weights of SDXL take a minute to draw, on a GPU seconds.
    """
    folder, making = scene.scratch / "random-sdxl", scene.scratch / "making"
    with (scene.scratch / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            shutil.rmtree(making, ignore_errors=True)  # of a stage that was killed meanwhile
            size = scene.pick("sdxl", "tiny")
            write_random_model(making, size=size, dtype=torch.float16, device=scene.device)
            making.rename(folder)
    return folder
