"""The network that follows the student: a diffusion model of its images, with a GAN's critic.

It starts as a copy of the teacher and learns by denoising what the student makes. The student
moves meanwhile, so it is trained several times for each of the student's steps, the
"two-time-scale" rule of DMD2 (arXiv 2405.14867, section 4.2), without which its score is that
of images which the student no longer makes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dmd2.sampling.sampler import add_noise
from training.method.conditioning import Conditioning, per_image
from training.method.discriminator import BottleneckCritic, bottleneck_of, critic_loss


class FakeScore(nn.Module):
    """The fake score network and the critic on its bottleneck, in one forward pass.

    Args:
        unet: predicts noise; a copy of the teacher.
        critic: reads the bottleneck; None trains without a GAN.
    """

    def __init__(self, unet: Any, critic: BottleneckCritic | None) -> None:
        super().__init__()
        self.unet = unet
        self.critic = critic

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        *,
        real: torch.Tensor | None = None,
        judge: bool = False,
    ) -> Any:
        """The noise prediction [B, 4, H/8, W/8], as NoisePredictor's.

        There is one forward for all, since DDP and FSDP see nothing but forward.

        Args:
            latents: the student's images, noised, [B, 4, H/8, W/8].
            timesteps: int64 [B].
            conditioning: of the captions.
            real: images of the data for the same captions, noised alike. Given, the answer is
                the noise prediction, the logits of latents [B] and those of real [B].
            judge: answer with the logits [B] of latents alone, at half the cost.
        """
        if judge:
            return self._judge(latents, timesteps, conditioning)
        if real is None:
            return self.unet(latents, timesteps, **conditioning.unet_inputs()).sample
        with bottleneck_of(self.unet) as seen:
            noise_pred = self.unet(latents, timesteps, **conditioning.unet_inputs()).sample
        real_logits = self._judge(real, timesteps, conditioning)
        return noise_pred, self._logits(seen.features), real_logits

    def _judge(
        self, noised: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        with bottleneck_of(self.unet, stop_there=True) as seen:
            self.unet(noised, timesteps, **conditioning.unet_inputs())
        return self._logits(seen.features)

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        if self.critic is None:
            raise ValueError("this fake score network was made without a critic")
        logits: torch.Tensor = self.critic(features)
        return logits


def fake_score_loss(
    fake_score: nn.Module,
    x0: torch.Tensor,
    conditioning: Conditioning,
    alphas_cumprod: torch.Tensor,
    *,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    critic_weight: float = 0.0,
    real: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The fake score network's losses: denoising the student's images, and telling them apart.

    Args:
        fake_score: a FakeScore, maybe wrapped by DDP or FSDP.
        x0: the student's images, float32 [B, 4, H/8, W/8]; detached here.
        conditioning: of the captions.
        alphas_cumprod: float32 [1000].
        timesteps: int64 [B].
        noise: float32, as x0; the data's images get the same.
        critic_weight: of the critic's loss.
        real: images of the data for the same captions, as x0; None without a GAN.

    Returns:
        "loss", of which the gradient is taken, and its parts "denoising" and "critic".
    """
    alpha = per_image(alphas_cumprod, timesteps)
    noised = add_noise(x0.detach(), noise, alpha)
    if real is None:
        noise_pred = fake_score(noised, timesteps, conditioning)
        denoising = (noise_pred.float() - noise).square().mean()
        return {"loss": denoising, "denoising": denoising}
    noise_pred, fake_logits, real_logits = fake_score(
        noised, timesteps, conditioning, real=add_noise(real, noise, alpha)
    )
    denoising = (noise_pred.float() - noise).square().mean()
    critic = critic_loss(real_logits, fake_logits)
    return {"loss": denoising + critic_weight * critic, "denoising": denoising, "critic": critic}
