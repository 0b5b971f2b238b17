"""Backward simulation: the student learns its later steps on images that it made itself.

At inference, step k starts from what the student made of steps 0..k-1, and not from noised data.
DMD2 trains it on just that (arXiv 2405.14867, section 4.5): the student is run from noise, with
the sampler that the container uses, and stopped before step k.
"""

from __future__ import annotations

from itertools import islice, pairwise

import torch
from torch import nn

from dmd2.sampling.sampler import add_noise
from training.method.conditioning import Conditioning, per_image, predict_x0


@torch.no_grad()
def simulate(
    student: nn.Module,
    noise: torch.Tensor,
    conditioning: Conditioning,
    alphas_cumprod: torch.Tensor,
    timesteps: tuple[int, ...],
    stop_before: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """The student's x_t at timesteps[stop_before], float32 [B, 4, H/8, W/8].

    Args:
        student: predicts noise.
        noise: x_t at timesteps[0], float32 [B, 4, H/8, W/8].
        conditioning: of the captions.
        alphas_cumprod: float32 [1000].
        timesteps: the student's, falling.
        stop_before: 0 returns the noise as it is.
        generator: a CPU generator, for the noise between the steps.
    """
    latents = noise
    for now, following in islice(pairwise(timesteps), stop_before):
        t = torch.full((len(latents),), now, device=latents.device)
        x0 = predict_x0(student, latents, t, conditioning, alphas_cumprod)
        fresh = torch.randn(latents.shape, generator=generator).to(latents.device)
        latents = add_noise(x0, fresh, per_image(alphas_cumprod, torch.full_like(t, following)))
    return latents
