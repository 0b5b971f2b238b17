"""A folder of pictures with captions beside them, as the trainer reads it for SDXL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from training.encode import encode

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class CaptionedFolder:
    """Pictures NAME.png (or .jpg, .webp) with their captions in NAME.txt.

    Each passing through the folder is in an order of its own.

    Args:
        folder: is searched with all folders below.
        vae: encodes the pictures.
        size: of the square that they are scaled and cut to, in pixels.
        seed: of the orders.

    Raises:
        ValueError: the folder has no such pair, or a picture has no caption.
    """

    def __init__(self, folder: Path, vae: Any, size: int, seed: int) -> None:
        self._paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not self._paths:
            raise ValueError(f"{folder} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
        bare = next((p for p in self._paths if not p.with_suffix(".txt").is_file()), None)
        if bare is not None:
            raise ValueError(f"{bare} has no caption: write it into {bare.stem}.txt beside it")
        self._vae, self._size, self._seed = vae, size, seed

    @torch.no_grad()
    def batch(self, indices: range) -> tuple[torch.Tensor, list[str]]:
        """Latents float32 [B, 4, size/8, size/8] of about unit variance, and captions."""
        paths = [self._path(index) for index in indices]
        pictures = np.stack([self._picture(path) for path in paths])
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = encode(self._vae, images.to(self._vae.device, self._vae.dtype))
        return latents.float(), [self.caption(index) for index in indices]

    def caption(self, index: int) -> str:
        """What stands in the picture's text file."""
        return self._path(index).with_suffix(".txt").read_text(encoding="utf-8").strip()

    def _path(self, index: int) -> Path:
        passing, place = divmod(index, len(self._paths))
        order = np.random.default_rng([self._seed, passing]).permutation(len(self._paths))
        return self._paths[int(order[place])]

    def _picture(self, path: Path) -> np.ndarray:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (self._size, self._size))
        return np.asarray(square)
