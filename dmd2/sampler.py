"""The few-step sampler: fixed timesteps, predicted x0, re-noising. Torch only, no models.

DMD2 (arXiv 2405.14867, section 4.4) samples as a consistency model does: at each of its
timesteps the UNet's noise prediction gives an image x0, which fresh noise takes to the next
timestep; the last x0 is the output. diffusers' LCMScheduler computes the same, up to its
boundary factors, which are 1 to within 1e-7 at these timesteps.
"""

from __future__ import annotations

import torch


def predict_x0(
    latents: torch.Tensor, noise_pred: torch.Tensor, alpha_cumprod: torch.Tensor
) -> torch.Tensor:
    """The image that a noise prediction implies (DDIM, arXiv 2010.02502, equation 9).

    x0 = (x_t - sqrt(1 - a_t) * eps) / sqrt(a_t), in float32 whatever comes in: at t = 999 the
    division multiplies every rounding error by 14.6.

    Args:
        latents: x_t, float32 [4, H/8, W/8].
        noise_pred: the UNet's epsilon, any float dtype, the same shape.
        alpha_cumprod: a_t, float32 scalar, above 0.
    """
    noise = (1 - alpha_cumprod).sqrt() * noise_pred.float()
    return (latents.float() - noise) / alpha_cumprod.sqrt()


def add_noise(x0: torch.Tensor, noise: torch.Tensor, alpha_cumprod: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(a_t) * x0 + sqrt(1 - a_t) * noise (DDPM, arXiv 2006.11239, equation 4)."""
    return alpha_cumprod.sqrt() * x0 + (1 - alpha_cumprod).sqrt() * noise


def guide(uncond: torch.Tensor, cond: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance (arXiv 2207.12598): uncond + scale * (cond - uncond)."""
    return uncond + guidance_scale * (cond - uncond)


def add_time_ids(height: int, width: int) -> torch.Tensor:
    """SDXL's size conditioning, float32 [6]: original size, crop at 0, 0, target size.

    Height stands before width in each pair (SDXL report, arXiv 2307.01952, section 2.2).
    """
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)


class Trajectory:
    """One image's way from noise to its last x0.

    The noise comes from a CPU generator of its own, in float32, as diffusers draws it: the
    same seed gives the same image on every device, alone or in company.

    Attributes:
        latents: float32 [4, H/8, W/8] on the device: x_t while under way, x0 when done.
    """

    def __init__(
        self,
        timesteps: tuple[int, ...],
        latent_shape: tuple[int, int, int],
        seed: int,
        device: torch.device,
    ) -> None:
        self._timesteps = timesteps
        self._next = 0
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._device = device
        self._shape = latent_shape
        self.latents = self._noise()

    @property
    def done(self) -> bool:
        """Whether latents is the finished x0."""
        return self._next == len(self._timesteps)

    @property
    def timestep(self) -> int:
        """The timestep that the UNet is to be run at next."""
        return self._timesteps[self._next]

    def advance(self, noise_pred: torch.Tensor, alphas_cumprod: torch.Tensor) -> None:
        """Take one step with the UNet's prediction [4, H/8, W/8] for timestep.

        alphas_cumprod: float32 [1000] on the latents' device.
        """
        x0 = predict_x0(self.latents, noise_pred, alphas_cumprod[self.timestep])
        self._next += 1
        if self.done:
            self.latents = x0
        else:
            self.latents = add_noise(x0, self._noise(), alphas_cumprod[self.timestep])

    def _noise(self) -> torch.Tensor:
        # [1, ...] as diffusers asks for it, so that the generator fills it in the same order.
        noise = torch.randn((1, *self._shape), generator=self._generator, dtype=torch.float32)
        return noise[0].to(self._device)
