"""Drawings for the demo's things that need no network: what the tests train on."""

from __future__ import annotations

import colorsys
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch

from training.demo.drawing import draw
from training.demo.drawings import Drawings
from training.demo.icons import ICONS
from training.demo.scenes import sample
from training.demo.vae import as_tensor


def discs() -> dict[str, str]:
    """SVG bodies in which each thing is a disc of a colour of its own."""
    bodies = {}
    for number, name in enumerate(ICONS.values()):
        red, green, blue = (
            int(255 * part) for part in colorsys.hsv_to_rgb(number / len(ICONS), 0.8, 0.9)
        )
        bodies[name] = f'<circle cx="16" cy="16" r="13" fill="rgb({red},{green},{blue})"/>'
    return bodies


def pictures(seed: int, num: int) -> torch.Tensor:
    """The data set's first pictures with discs for things, float32 [num, 3, 128, 128] in -1..1."""
    drawings = Drawings(discs(), 32)
    drawn = [draw(sample(seed, index).scene, drawings) for index in range(num)]
    return as_tensor(torch.from_numpy(np.stack(drawn)))


def archive_of_discs(path: Path) -> Path:
    """Write an archive like npm's of the discs."""
    icons = {name: {"body": body} for name, body in discs().items()}
    content = json.dumps({"icons": icons, "width": 32, "height": 32}).encode()
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path
