"""Changing model folders, and stock diffusers on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from numpy.typing import NDArray
from PIL import Image

from dmd2.request.generation_request import GenerationRequest
from dmd2.settings import ROOT

SDXL = ROOT / "weights" / "sdxl-4step"


def give_card(folder: Path, timesteps: dict[str, list[int]], **more: Any) -> Path:
    """Write dmd2.json into a folder and return the folder."""
    card = {"name": folder.name, "timesteps": timesteps, "default_size": [64, 64]}
    card |= {"safety_checker": None, **more}
    (folder / "dmd2.json").write_text(json.dumps(card))
    return folder


def copy_with(folder: Path, to: Path, config: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a model folder with one JSON file changed in place by change."""
    shutil.copytree(folder, to)
    content = json.loads((to / config).read_text())
    change(content)
    (to / config).write_text(json.dumps(content))
    return to


def pixels_of(path: Path) -> NDArray[np.int16]:
    """A file's RGB pixels [H, W, 3], signed so that they can be subtracted."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(np.int16)


class StockDiffusers:
    """diffusers' own SDXL pipeline with its own LCMScheduler on a model folder."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> None:
        pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype, **more)
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        self._pipe = pipe

    def save(self, folder: Path, **how: Any) -> None:
        """Save it as its users do."""
        self._pipe.save_pretrained(folder, **how)

    def to(self, device: str) -> StockDiffusers:
        """The same pipeline on a device."""
        self._pipe.to(device)
        return self

    def decode_with(self, vae: Any) -> None:
        """Take another VAE."""
        self._pipe.vae = vae

    def decode_in_tiles(self, side: int) -> None:
        """Decode in tiles of side x side pixels."""
        self._pipe.vae.enable_tiling()
        self._pipe.vae.tile_sample_min_size = side
        self._pipe.vae.tile_latent_min_size = side // 8

    def image(self, request: GenerationRequest, index: int) -> NDArray[np.int16]:
        """Image index of a request, made alone from seed + index: int16 [H, W, 3]."""
        image = self._pipe(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            width=request.width,
            height=request.height,
            timesteps=list(request.timesteps),
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seed + index),
        ).images[0]
        return np.asarray(image).astype(np.int16)
