"""The few-step sampler: fixed timesteps, predicted x0, re-noising. Torch only, no models.

DMD2 (arXiv 2405.14867, section 4.4) samples as a consistency model does: at each of its
timesteps the UNet's noise prediction gives an image x0, which fresh noise takes to the next
timestep; the last x0 is the output. diffusers' LCMScheduler computes the same, up to its
boundary factors, which are 1 to within 1e-7 at these timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmd2.models import device_work


def predict_x0(
    latents: torch.Tensor, noise_pred: torch.Tensor, alpha_cumprod: torch.Tensor
) -> torch.Tensor:
    """The image that a noise prediction implies (DDIM, arXiv 2010.02502, equation 9).

    x0 = (x_t - sqrt(1 - a_t) * eps) / sqrt(a_t), in float32 whatever comes in: at t = 999 the
    division multiplies every rounding error by 14.6.

    Args:
        latents: x_t, float32 [..., 4, H/8, W/8].
        noise_pred: the UNet's epsilon, any float dtype, the same shape.
        alpha_cumprod: a_t, float32, above 0, a scalar or of a shape that broadcasts.
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

    All its noise comes from a CPU generator of its own, in float32, as diffusers draws it: the
    same seed gives the same image on every device, alone or in company. What a step adds is drawn
    when it is asked for, which is after its UNet call was launched: the device works meanwhile.

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
        self._shape, self._seed, self._device = latent_shape, seed, device
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._fresh_noise: torch.Tensor | None = None
        self.latents = self._draw()

    def from_start(self, timesteps: tuple[int, ...] | None = None) -> Trajectory:
        """The same image's way from its first noise, at its own timesteps or at others."""
        return Trajectory(timesteps or self._timesteps, self._shape, self._seed, self._device)

    @property
    def done(self) -> bool:
        """Whether latents is the finished x0."""
        return self._next == len(self._timesteps)

    @property
    def timestep(self) -> int:
        """The timestep that the UNet is to be run at next."""
        return self._timesteps[self._next]

    @property
    def following_timestep(self) -> int | None:
        """The timestep after that; None if the next step is the last."""
        is_last = self._next + 1 == len(self._timesteps)
        return None if is_last else self._timesteps[self._next + 1]

    @property
    def fresh_noise(self) -> torch.Tensor:
        """What takes x0 to following_timestep; in the last step, what counts nothing."""
        if self.following_timestep is None:
            return self.latents
        if self._fresh_noise is None:  # else this is the second try at a step that failed
            self._fresh_noise = self._draw()
        return self._fresh_noise

    def advance(self, latents: torch.Tensor) -> None:
        """Note the latents after the step at timestep."""
        self.latents = latents
        self._fresh_noise = None
        self._next += 1

    def _draw(self) -> torch.Tensor:
        # [1, ...] as diffusers asks for it, so that the generator fills it in the same order.
        drawn = torch.randn((1, *self._shape), generator=self._generator)
        return device_work.to_device(drawn, self._device)[0]


def step(
    trajectories: Sequence[Trajectory], noise_pred: torch.Tensor, alphas_cumprod: torch.Tensor
) -> None:
    """Take every image one step further, each at its own timestep.

    Args:
        trajectories: B images of one size.
        noise_pred: the UNet's epsilon for their latents and timesteps, [B, 4, H/8, W/8].
        alphas_cumprod: a_t, float32 [1000], on the latents' device.
    """
    now = torch.stack([alphas_cumprod[t.timestep] for t in trajectories])
    ones = torch.ones_like(alphas_cumprod[0])  # a = 1 is no noise: the last step's x0 stays
    following = torch.stack(
        [
            ones if t.following_timestep is None else alphas_cumprod[t.following_timestep]
            for t in trajectories
        ]
    )
    x0 = predict_x0(
        torch.stack([t.latents for t in trajectories]), noise_pred, now[:, None, None, None]
    )
    noise = torch.stack([t.fresh_noise for t in trajectories])
    for trajectory, latents in zip(
        trajectories, add_noise(x0, noise, following[:, None, None, None]), strict=True
    ):
        trajectory.advance(latents)
