"""The teacher's own way from noise to an image: DDIM without fresh noise (arXiv 2010.02502).

It is a solver of the diffusion's probability-flow ODE: the image is a function of the noise.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from dmd2.sampling.sampler import add_noise
from training.method.conditioning import Conditioning, per_image, predict_x0


@torch.no_grad()
def follow_ode(
    model: nn.Module,
    noise: torch.Tensor,
    conditioning: Conditioning,
    alphas_cumprod: torch.Tensor,
    *,
    num_steps: int,
    guidance_scale: float,
) -> torch.Tensor:
    """The images x0 that noise becomes, float32 [B, 4, H/8, W/8].

    Args:
        model: a NoisePredictor.
        noise: x_t at t = 999, float32 [B, 4, H/8, W/8].
        conditioning: of the captions.
        alphas_cumprod: float32 [1000].
        num_steps: equal ones, from 999 on ("trailing").
        guidance_scale: of classifier-free guidance, which doubles the cost of a step.
    """
    ends = [round(1000 * (1 - step / num_steps)) - 1 for step in range(num_steps + 1)]
    latents = noise
    for now, following in pairwise(ends):
        t = torch.full((len(latents),), now, device=latents.device)
        alpha = per_image(alphas_cumprod, t)
        x0 = predict_x0(model, latents, t, conditioning, alphas_cumprod, guidance_scale)
        if following < 0:
            return x0
        noise_pred = (latents - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        latents = add_noise(x0, noise_pred, per_image(alphas_cumprod, t - now + following))
    raise ValueError(f"num_steps must be at least 1, is {num_steps}")
