"""Latents to pixels."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dmd2.errors import GenerationError


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The picture of finished latents.

    Half-precision decoders can overflow; a decode that is not finite is done again on a
    float32 copy of the decoder, so that the loaded one stays as it was.

    Args:
        vae: diffusers' AutoencoderKL, or another autoencoder with its decode and config.
        latents: x0, float32 [4, H/8, W/8], scaled as the UNet sees them.

    Returns:
        uint8 [H, W, 3], 0 to 255, on the VAE's device.

    Raises:
        GenerationError: the latents, or even the float32 decode, are not finite.
    """
    if not latents.isfinite().all():
        raise GenerationError("the UNet returned latents that are not finite: NaN or infinity")
    scaled = latents[None] / vae.config.scaling_factor
    image = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    if not image.isfinite().all():
        image = copy.deepcopy(vae).float().decode(scaled, return_dict=False)[0]
    if not image.isfinite().all():
        raise GenerationError("the VAE's output is not finite, in float32 too")
    return _to_uint8(image[0].float())


def _to_uint8(image: torch.Tensor) -> torch.Tensor:
    """[3, H, W] in -1..1 to [H, W, 3] in 0..255, rounded as diffusers' VaeImageProcessor does."""
    unit = (image / 2 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(1, 2, 0)
