"""What steers a UNet, and the UNet as a function to the image that it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dmd2.sampling import sampler


@dataclass(frozen=True)
class Conditioning:
    """The captions and sizes of a batch, as SDXL's UNet takes them.

    Attributes:
        prompt_embeds: [B, 77, D].
        pooled_prompt_embeds: [B, P].
        add_time_ids: [B, 6].
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    add_time_ids: torch.Tensor

    def dropped(self) -> Conditioning:
        """The same sizes without a caption: all embeddings zero, as in SDXL's training."""
        return Conditioning(
            torch.zeros_like(self.prompt_embeds),
            torch.zeros_like(self.pooled_prompt_embeds),
            self.add_time_ids,
        )

    def followed_by(self, other: Conditioning) -> Conditioning:
        """Both batches as one."""
        return Conditioning(
            torch.cat([self.prompt_embeds, other.prompt_embeds]),
            torch.cat([self.pooled_prompt_embeds, other.pooled_prompt_embeds]),
            torch.cat([self.add_time_ids, other.add_time_ids]),
        )

    def unet_inputs(self) -> dict[str, Any]:
        """The keyword arguments of UNet2DConditionModel.forward."""
        return {
            "encoder_hidden_states": self.prompt_embeds,
            "added_cond_kwargs": {
                "text_embeds": self.pooled_prompt_embeds,
                "time_ids": self.add_time_ids,
            },
        }


class NoisePredictor(nn.Module):
    """A UNet as a module of latents, timesteps and Conditioning."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The noise prediction [B, 4, H/8, W/8]; timesteps are int64 [B]."""
        noise_pred: torch.Tensor = self.unet(
            latents, timesteps, **conditioning.unet_inputs()
        ).sample
        return noise_pred


@torch.no_grad()
def condition(
    captions: list[str],
    tokenizers: Sequence[Any],
    encoders: Sequence[Any],
    latent_shape: Sequence[int],
) -> Conditioning:
    """Embed captions for latents [4, H/8, W/8] on the encoders' device."""
    device = encoders[0].device
    token_ids = [tokenize(tokenizer, captions).to(device) for tokenizer in tokenizers]
    prompt_embeds, pooled = embed(encoders, token_ids)
    height, width = (8 * side for side in latent_shape[1:])
    time_ids = sampler.add_time_ids(height, width).to(device).expand(len(captions), -1)
    return Conditioning(prompt_embeds, pooled, time_ids)


def embed(
    encoders: Sequence[nn.Module], token_ids: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """prompt_embeds [B, 77, D1 + D2] and pooled_prompt_embeds [B, D2], as SDXL reads captions.

    Args:
        encoders: text_encoder and text_encoder_2.
        token_ids: for each of them [B, 77].
    """
    outputs = [
        encoder(ids, output_hidden_states=True)
        for encoder, ids in zip(encoders, token_ids, strict=True)
    ]
    return torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[1].text_embeds


def tokenize(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """Token ids int64 [B, 77], padded and cut as the container does it."""
    ids: torch.Tensor = tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def per_image(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """a_t for each image of a batch, float32 [B, 1, 1, 1]."""
    return alphas_cumprod[timesteps][:, None, None, None]


def predict_x0(
    model: nn.Module,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    alphas_cumprod: torch.Tensor,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """The image x0 that a model sees in noised latents, float32 [B, 4, H/8, W/8].

    Args:
        model: a NoisePredictor, or what has its forward.
        latents: x_t, [B, 4, H/8, W/8].
        timesteps: int64 [B].
        conditioning: of the captions.
        alphas_cumprod: float32 [1000].
        guidance_scale: of classifier-free guidance; 1 is none, and costs half.
    """
    alpha = per_image(alphas_cumprod, timesteps)
    if guidance_scale == 1.0:
        return sampler.predict_x0(latents, model(latents, timesteps, conditioning), alpha)
    both = model(
        torch.cat([latents, latents]),
        torch.cat([timesteps, timesteps]),
        conditioning.dropped().followed_by(conditioning),
    ).float()
    uncond, cond = both.chunk(2)
    return sampler.predict_x0(latents, sampler.guide(uncond, cond, guidance_scale), alpha)
