"""The sampler's formulas against diffusers' LCMScheduler, and its noise."""

from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler

from dmd2.sampling import sampler
from dmd2.sampling.sampler import Trajectory

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 8, 12)
CPU = torch.device("cpu")


def fake_unet(latents: torch.Tensor, timestep: int) -> torch.Tensor:
    return torch.tanh(latents * 1.5 + timestep / 1000)


@pytest.mark.parametrize("timesteps", [(999, 749, 499, 249), (999, 499), (399,)])
def test_a_trajectory_is_lcm_at_the_fixed_timesteps(timesteps: tuple[int, ...]) -> None:
    scheduler = LCMScheduler(**SCHEDULE)
    scheduler.set_timesteps(timesteps=list(timesteps))
    generator = torch.Generator().manual_seed(5)
    expected = torch.randn((1, *SHAPE), generator=generator)
    for t in scheduler.timesteps:
        noise_pred = fake_unet(expected, int(t))
        expected = scheduler.step(noise_pred, t, expected, generator=generator).prev_sample
    trajectory = Trajectory(timesteps, SHAPE, 5, CPU)
    seen = []
    while not trajectory.done:
        seen.append(trajectory.timestep)
        noise_pred = fake_unet(trajectory.latents, trajectory.timestep)
        sampler.step([trajectory], noise_pred[None], scheduler.alphas_cumprod)
    assert tuple(seen) == timesteps
    torch.testing.assert_close(trajectory.latents, expected[0], rtol=0, atol=2e-5)


def test_images_at_different_steps_advance_together_as_they_would_alone() -> None:
    alphas_cumprod = LCMScheduler(**SCHEDULE).alphas_cumprod
    timesteps = (999, 749, 499, 249)
    together = [Trajectory(timesteps, SHAPE, seed, CPU) for seed in range(3)]
    alone = [Trajectory(timesteps, SHAPE, seed, CPU) for seed in range(3)]
    for number, trajectory in enumerate(together):  # 0, 1 and 2 steps ahead
        for _ in range(number):
            one_step([trajectory], alphas_cumprod)
    while waiting := [trajectory for trajectory in together if not trajectory.done]:
        one_step(waiting, alphas_cumprod)
    for trajectory, twin in zip(together, alone, strict=True):
        while not twin.done:
            one_step([twin], alphas_cumprod)
        assert torch.equal(trajectory.latents, twin.latents)


def one_step(trajectories: list[Trajectory], alphas_cumprod: torch.Tensor) -> None:
    noise_pred = torch.stack([fake_unet(t.latents, t.timestep) for t in trajectories])
    sampler.step(trajectories, noise_pred, alphas_cumprod)


def test_lcm_by_default_would_use_other_timesteps() -> None:
    """Why the timesteps are ours and not the scheduler's."""
    scheduler = LCMScheduler(**SCHEDULE)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() != [999, 749, 499, 249]


def test_x0_is_formed_in_float32() -> None:
    alpha = LCMScheduler(**SCHEDULE).alphas_cumprod[999]
    x0, eps = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    noisy = sampler.add_noise(x0, eps, alpha)
    assert sampler.predict_x0(noisy, eps.half(), alpha).dtype == torch.float32
    torch.testing.assert_close(sampler.predict_x0(noisy, eps, alpha), x0, rtol=0, atol=1e-4)
    in_half = (noisy.half() - (1 - alpha).sqrt().half() * eps.half()) / alpha.sqrt().half()
    error = (sampler.predict_x0(noisy, eps.half(), alpha) - x0).square().mean().sqrt()
    assert error < 0.7 * (in_half.float() - x0).square().mean().sqrt()


def test_noise_follows_the_seed_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (Trajectory((399,), SHAPE, seed, CPU).latents for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_guidance() -> None:
    uncond, cond = torch.tensor([1.0]), torch.tensor([3.0])
    assert sampler.guide(uncond, cond, 0).item() == 1
    assert sampler.guide(uncond, cond, 1).item() == 3
    assert sampler.guide(uncond, cond, 2.5).item() == 6


def test_time_ids_put_height_first() -> None:
    assert sampler.add_time_ids(height=768, width=1344).tolist() == [768, 1344, 0, 0, 768, 1344]
