"""Latents to pixels."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dmd2.errors import GenerationError

# Past so many elements in a layer, convolutions may go wrong in silence (pytorch #141831).
_MAX_ELEMENTS = 2**31 - 1


def most_at_once(vae: Any, height: int, width: int) -> int:
    """How many latents of a height and a width may be decoded in one call; at least 1.

    Args:
        vae: diffusers' AutoencoderKL, or an AutoencoderTiny.
        height: of the latents.
        width: of the latents.
    """
    config = vae.config
    tiny = "decoder_block_out_channels" in config
    channels = config.decoder_block_out_channels if tiny else config.block_out_channels
    # The second-finest level's channels reach full resolution, by its upsampling.
    widest: int = max(channels[:2]) * 4 ** (len(channels) - 1) * height * width
    return max(1, _MAX_ELEMENTS // widest)


def decode(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures of finished latents, and which of them to believe.

    Args:
        vae: diffusers' AutoencoderKL, or another autoencoder with its decode and config.
        latents: x0, float32 [B, 4, H/8, W/8], scaled as the UNet sees them.

    Returns:
        uint8 [B, H, W, 3], 0 to 255, and bool [B]: whether latents and decode were finite
        throughout, as half-precision decoders sometimes are not. Both on the VAE's device.
    """
    images = decode_to_float(vae, latents)
    # A decoder that ends in tanh, as TAESDXL does, makes finite images of infinite latents.
    return to_uint8(images.float()), _are_finite(images) & _are_finite(latents)


def decode_to_float(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The same pictures as the decoder returns them: [B, 3, H, W] in its dtype, about -1..1."""
    scaled = latents / vae.config.scaling_factor
    images: torch.Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return images


def decode_in_float32(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The pictures uint8 [B, H, W, 3] by a float32 copy of the decoder, which stays as it was.

    Raises:
        GenerationError: the latents, or even the float32 decode, are not finite.
    """
    if not latents.isfinite().all():
        raise GenerationError("the UNet returned latents that are not finite: NaN or infinity")
    pixels, is_finite = decode(copy.deepcopy(vae).float(), latents)
    if not is_finite.all():
        raise GenerationError("the VAE's output is not finite, in float32 too")
    return pixels


def _are_finite(batch: torch.Tensor) -> torch.Tensor:
    """Bool [B] for [B, C, H, W]."""
    return batch.isfinite().all(dim=3).all(dim=2).all(dim=1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in -1..1 to [B, H, W, 3] in 0..255, rounded as diffusers does."""
    unit = (images / 2 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
