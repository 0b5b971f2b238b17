"""DMD's gradient: from where the student's images are likely, to where the teacher's are.

The student's images follow a distribution p_fake, the teacher's follow p_real. The gradient of
KL(p_fake || p_real) with respect to a student's image is the difference of the two scores
(DMD, arXiv 2311.18828, equation 7), and a score is, up to a factor, the image that a diffusion
model sees in the noised image. The teacher knows the real one, with the guidance that is to be
distilled in; a second network, trained on the student's images, knows the fake one.
"""

from __future__ import annotations

import torch
from torch import nn

from dmd2.sampling.sampler import add_noise
from training.method.conditioning import Conditioning, per_image, predict_x0


@torch.no_grad()
def distribution_matching_gradient(
    x0: torch.Tensor, real_x0: torch.Tensor, fake_x0: torch.Tensor
) -> torch.Tensor:
    """(fake_x0 - real_x0) / mean |x0 - real_x0|, the mean being over each image.

    The normalisation (arXiv 2311.18828, equation 8) makes the step as large at every noise
    level. Walking against the gradient leads to the teacher's distribution.

    Args:
        x0: the student's images, float32 [B, ...].
        real_x0: what the teacher sees in x0 noised.
        fake_x0: what the fake score network sees in it.
    """
    dims = tuple(range(1, x0.ndim))
    scale = (x0 - real_x0).abs().mean(dim=dims, keepdim=True)
    return (fake_x0 - real_x0) / scale.clamp(min=1e-6)


def loss_with_gradient(x0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A scalar whose gradient with respect to x0 is gradient / x0.numel().

    Its value is the mean of half the gradient's square, which is worth a line in a log.
    """
    target = (x0 - gradient).detach()
    return 0.5 * (x0 - target).square().mean()


def distribution_matching_loss(
    x0: torch.Tensor,
    teacher: nn.Module,
    fake_score: nn.Module,
    conditioning: Conditioning,
    alphas_cumprod: torch.Tensor,
    *,
    guidance_scale: float,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """The loss that moves the student's images by the two scores.

    Args:
        x0: the student's images, float32 [B, 4, H/8, W/8], with their graph.
        teacher: predicts noise; gets no gradient.
        fake_score: likewise.
        conditioning: of the captions.
        alphas_cumprod: float32 [1000].
        guidance_scale: of the teacher.
        timesteps: int64 [B], at which the scores are taken.
        noise: as x0.
    """
    with torch.no_grad():
        noised = add_noise(x0, noise, per_image(alphas_cumprod, timesteps))
        real_x0 = predict_x0(
            teacher, noised, timesteps, conditioning, alphas_cumprod, guidance_scale
        )
        fake_x0 = predict_x0(fake_score, noised, timesteps, conditioning, alphas_cumprod)
    return loss_with_gradient(x0, distribution_matching_gradient(x0, real_x0, fake_x0))


def draw_timesteps(num: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform timesteps between the shares low and high of 1000: int64 [num]."""
    return torch.randint(int(low * 1000), int(high * 1000), (num,), generator=generator)
