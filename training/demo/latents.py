"""The demo's data set in the VAE's latent space, encoded once and kept in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from tqdm import tqdm

from training.demo import scenes
from training.demo.vae import whole_pictures
from training.encode import encode

_CHUNK = 32
_CAPTIONINGS = 1 << 16  # more than any run has epochs


class LatentScenes:
    """The first num_scenes of a data set: latents, and captions told anew at each passing.

    Args:
        seed: of the data set.
        latents: float16 [num_scenes, 4, 16, 16], scaled to unit variance.
    """

    def __init__(self, seed: int, latents: NDArray[np.float16]) -> None:
        self._seed = seed
        self._latents = latents

    def batch(self, indices: range) -> tuple[torch.Tensor, list[str]]:
        """Latents float32 [B, 4, 16, 16] and captions; past the end it begins again, retold."""
        num_scenes = len(self._latents)
        rows = [index % num_scenes for index in indices]
        captions = [
            scenes.sample(self._seed, row, telling=index // num_scenes % _CAPTIONINGS).caption
            for index, row in zip(indices, rows, strict=True)
        ]
        return torch.from_numpy(self._latents[rows].astype(np.float32)), captions


def encoded_scenes(
    path: Path, vae: AutoencoderKL, accelerator: Accelerator, *, num_scenes: int, seed: int
) -> LatentScenes:
    """The data set from a file, which the processes of a run write together if it is not there."""
    shape = (num_scenes, 4, scenes.IMAGE_SIZE // 8, scenes.IMAGE_SIZE // 8)
    partial = path.with_suffix(".partial.npy")
    if not path.exists():
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            open_memmap(partial, "w+", np.float16, shape).flush()
        accelerator.wait_for_everyone()
        _encode_share(open_memmap(partial, "r+"), vae, accelerator, seed)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            partial.rename(path)
        accelerator.wait_for_everyone()
    latents = np.load(path)
    if latents.shape != shape:
        raise ValueError(f"{path} has shape {latents.shape}, not {shape}: delete it")
    return LatentScenes(seed, latents)


@torch.no_grad()
def _encode_share(
    latents: NDArray[np.float16], vae: AutoencoderKL, accelerator: Accelerator, seed: int
) -> None:
    """Encode this process's chunks of the data set."""
    vae.to(accelerator.device).eval()
    starts = range(
        _CHUNK * accelerator.process_index, len(latents), _CHUNK * accelerator.num_processes
    )
    for start in tqdm(starts, "encode", disable=not accelerator.is_main_process, mininterval=5):
        indices = range(start, min(start + _CHUNK, len(latents)))
        latents[indices.start : indices.stop] = encode(
            vae, whole_pictures(seed, indices).to(accelerator.device)
        ).cpu()
