"""Pictures to latents, as diffusion sees them."""

from __future__ import annotations

from typing import Any

import torch


def encode(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """The posterior's mean in the scale of diffusion, float32 [B, 4, H/8, W/8].

    Args:
        vae: diffusers' AutoencoderKL.
        images: float32 [B, 3, H, W] in -1..1.
    """
    mean: torch.Tensor = vae.encode(images).latent_dist.mean
    return mean * float(vae.config.scaling_factor)
