"""The demo's data set in the VAE's latent space, encoded once and kept in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from tqdm import tqdm

from training.demo.pictures import Painters, World, painters
from training.demo.scenes import IMAGE_SIZE
from training.demo.vae import as_tensor
from training.encode import encode

_CHUNK = 1024  # pictures that a process draws
_AT_ONCE = 128  # and encodes
TELLINGS = 4  # of each scene; after so many passings they begin again


class LatentScenes:
    """The first scenes of a data set: latents, and TELLINGS captions of each.

    Attributes:
        latents: float16 [num_scenes, 4, 16, 16], scaled to unit variance.
        captions: by telling and scene.
    """

    def __init__(self, latents: NDArray[np.float16], captions: Sequence[Sequence[str]]) -> None:
        self.latents, self.captions = latents, captions

    def batch(self, indices: range) -> tuple[torch.Tensor, list[str]]:
        """Latents float32 [B, 4, 16, 16] and captions; past the end it begins again, retold."""
        rows, tellings = self.places(indices)
        captions = [self.captions[t][row] for t, row in zip(tellings, rows, strict=True)]
        return torch.from_numpy(self.latents[rows].astype(np.float32)), captions

    def caption(self, index: int) -> str:
        """The caption of one sample of the data set."""
        (row,), (telling,) = self.places(range(index, index + 1))
        return self.captions[telling][row]

    def places(self, indices: range) -> tuple[list[int], list[int]]:
        """For each sample of the data set the number of its scene, and of its telling."""
        num_scenes = len(self.latents)
        rows = [index % num_scenes for index in indices]
        return rows, [index // num_scenes % len(self.captions) for index in indices]


def encoded_scenes(
    path: Path, vae: AutoencoderKL, accelerator: Accelerator, *, num_scenes: int, world: World
) -> LatentScenes:
    """The data set from a file, which the processes of a run write together if it is not there."""
    shape = (num_scenes, 4, IMAGE_SIZE // 8, IMAGE_SIZE // 8)
    partial = path.with_suffix(".partial.npy")
    if not path.exists():
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            open_memmap(partial, "w+", np.float16, shape).flush()
        accelerator.wait_for_everyone()
        with painters(world) as pool:
            _encode_share(open_memmap(partial, "r+"), vae, accelerator, pool)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            partial.rename(path)
        accelerator.wait_for_everyone()
    latents = np.load(path)
    if latents.shape != shape:
        raise ValueError(f"{path} has shape {latents.shape}, not {shape}: delete it")
    with painters(world) as pool:
        return LatentScenes(latents, [pool.captions(range(num_scenes), t) for t in range(TELLINGS)])


@torch.no_grad()
def _encode_share(
    latents: NDArray[np.float16], vae: AutoencoderKL, accelerator: Accelerator, pool: Painters
) -> None:
    """Encode this process's chunks of the data set."""
    vae.to(accelerator.device).eval()
    starts = range(
        _CHUNK * accelerator.process_index, len(latents), _CHUNK * accelerator.num_processes
    )
    for start in tqdm(starts, "encode", disable=not accelerator.is_main_process, mininterval=5):
        indices = range(start, min(start + _CHUNK, len(latents)))
        images = as_tensor(torch.from_numpy(pool.pictures(indices)).to(accelerator.device))
        parts = [encode(vae, part).cpu().numpy() for part in torch.split(images, _AT_ONCE)]
        latents[indices.start : indices.stop] = np.concatenate(parts)
