"""DMD2's parts against their formulas, on tensors small enough to check by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from random_model import SDXL_UNET, random_unet
from torch import nn

from dmd2.sampling import sampler
from training.method.backward_simulation import simulate
from training.method.conditioning import Conditioning, NoisePredictor, predict_x0
from training.method.discriminator import BottleneckCritic, critic_loss, student_gan_loss
from training.method.distribution_matching import (
    distribution_matching_gradient,
    distribution_matching_loss,
    draw_timesteps,
    loss_with_gradient,
)
from training.method.fake_score import FakeScore, fake_score_loss
from training.method.ode import follow_ode
from training.method.student import add_lora, lora_modules
from training.model_folder import noise_schedule

ALPHAS = noise_schedule().alphas_cumprod


def conditioning(num: int, width: int = 64, pooled: int = 32) -> Conditioning:
    generator = torch.Generator().manual_seed(num)
    return Conditioning(
        torch.randn(num, 77, width, generator=generator),
        torch.randn(num, pooled, generator=generator),
        torch.full((num, 6), 64.0),
    )


class Gaussian(nn.Module):
    """The exact noise prediction for data of N(mean, std^2)."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, _: Any) -> torch.Tensor:
        alpha = ALPHAS[timesteps][:, None, None, None]
        variance = alpha * (2 * self.log_std).exp() + 1 - alpha
        return (1 - alpha).sqrt() * (x - alpha.sqrt() * self.mean) / variance


class Unsteered(Conditioning):
    """No captions: one-dimensional worlds have none."""

    def __init__(self) -> None:
        super().__init__(torch.empty(0), torch.empty(0), torch.empty(0))


def test_the_gradient_is_the_difference_of_the_scores_over_its_scale() -> None:
    x0, real, fake = torch.randn(3, 2, 1, 2, 2).double()
    gradient = distribution_matching_gradient(x0, real, fake)
    for image in range(2):
        scale = sum(abs(v) for v in (x0[image] - real[image]).flatten().tolist()) / 4
        expected = (fake[image] - real[image]) / scale
        torch.testing.assert_close(gradient[image], expected)


def test_the_loss_has_the_gradient_that_it_is_given() -> None:
    x0 = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn_like(x0).detach()
    loss_with_gradient(x0, gradient).backward()
    torch.testing.assert_close(x0.grad, gradient / x0.numel())


def test_scores_are_taken_at_the_noised_image_with_the_teachers_guidance() -> None:
    teacher, fake = Guided(0.5), Gaussian(-1.0, 2.0)
    x0 = torch.randn(3, 1, 1, 1, requires_grad=True)
    t, noise = torch.tensor([100, 500, 900]), torch.randn(3, 1, 1, 1)
    captions = Conditioning(torch.ones(3, 77, 1), torch.ones(3, 1), torch.zeros(3, 6))
    distribution_matching_loss(
        x0, teacher, fake, captions, ALPHAS, guidance_scale=3.0, timesteps=t, noise=noise
    ).backward()

    alpha = ALPHAS[t][:, None, None, None]
    noised = alpha.sqrt() * x0.detach() + (1 - alpha).sqrt() * noise
    eps_real = 0.0 + 3.0 * (0.5 - 0.0)
    real = (noised - (1 - alpha).sqrt() * eps_real) / alpha.sqrt()
    fake_x0 = (noised - (1 - alpha).sqrt() * fake(noised, t, None).detach()) / alpha.sqrt()
    expected = (fake_x0 - real) / (x0.detach() - real).abs() / 3
    torch.testing.assert_close(x0.grad, expected)
    assert fake.mean.grad is None


class Guided(nn.Module):
    """Predicts value under a caption, and 0 without one."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor, _: torch.Tensor, captions: Conditioning) -> torch.Tensor:
        return self.value * captions.pooled_prompt_embeds[:, :, None, None].expand_as(x)


def test_the_timesteps_of_the_scores_stay_in_their_range() -> None:
    drawn = draw_timesteps(20000, 0.02, 0.98, torch.Generator().manual_seed(0))
    assert (drawn.min(), drawn.max()) == (20, 979)


def test_the_gans_gradients_are_those_of_their_formulas() -> None:
    real, fake = torch.randn(2, 5, dtype=torch.float64)
    real.requires_grad_()
    fake.requires_grad_()
    critic_loss(real, fake).backward()
    torch.testing.assert_close(real.grad, -(1 - real.sigmoid()).detach() / 5)
    torch.testing.assert_close(fake.grad, fake.sigmoid().detach() / 5)

    fake.grad = None
    student_gan_loss(fake).backward()
    torch.testing.assert_close(fake.grad, -(1 - fake.sigmoid()).detach() / 5)


def test_the_fake_score_learns_to_denoise_and_the_student_gets_nothing() -> None:
    model = Scaled()
    x0 = torch.randn(2, 1, 2, 2, requires_grad=True)
    noise, t = torch.randn(2, 1, 2, 2), torch.tensor([10, 700])
    losses = fake_score_loss(model, x0, Unsteered(), ALPHAS, timesteps=t, noise=noise)
    losses["loss"].backward()

    alpha = ALPHAS[t][:, None, None, None]
    noised = alpha.sqrt() * x0.detach() + (1 - alpha).sqrt() * noise
    expected = (2 * (0.3 * noised - noise) * noised).mean()
    torch.testing.assert_close(model.factor.grad, expected)
    assert x0.grad is None


class Scaled(nn.Module):
    """Predicts factor times what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor, _: torch.Tensor, __: Any) -> torch.Tensor:
        return self.factor * x


def test_the_critics_loss_is_added_with_its_weight() -> None:
    fake_score = FakeScore(random_unet("tiny"), BottleneckCritic(64))
    x0, real, noise = torch.randn(3, 2, 4, 8, 8)
    losses = fake_score_loss(
        fake_score, x0, conditioning(2), ALPHAS, timesteps=torch.tensor([3, 800]),
        noise=noise, critic_weight=0.25, real=real,
    )  # fmt: skip
    torch.testing.assert_close(losses["loss"], losses["denoising"] + 0.25 * losses["critic"])
    losses["critic"].backward()
    assert all(p.grad is not None for p in fake_score.critic.parameters())  # type-checked above
    assert fake_score.unet.mid_block.resnets[0].conv1.weight.grad is not None


def test_judging_alone_gives_the_same_logits_and_the_student_a_gradient() -> None:
    fake_score = FakeScore(random_unet("tiny"), BottleneckCritic(64)).eval()
    x, t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.tensor([5, 600])
    noise_pred, logits, real_logits = fake_score(x, t, conditioning(2), real=x.detach())
    alone = fake_score(x, t, conditioning(2), judge=True)
    torch.testing.assert_close(alone, logits)
    torch.testing.assert_close(real_logits, logits)
    plain = fake_score(x, t, conditioning(2))
    torch.testing.assert_close(noise_pred, plain)
    alone.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("stop_before", [0, 1, 3])
def test_backward_simulation_is_the_containers_own_sampler(stop_before: int) -> None:
    timesteps, student = (999, 749, 499, 249), NoisePredictor(random_unet("tiny")).eval()
    captions = conditioning(1)
    trajectory = sampler.Trajectory(timesteps, (4, 8, 8), 11, torch.device("cpu"))
    noise, generator = trajectory.latents[None].clone(), torch.Generator().manual_seed(11)
    torch.randn((1, 4, 8, 8), generator=generator)  # the trajectory has drawn its first noise
    with torch.no_grad():
        for _ in range(stop_before):
            t = torch.tensor([trajectory.timestep])
            eps = student(trajectory.latents[None], t, captions)
            sampler.step([trajectory], eps, ALPHAS)
    seen = simulate(student, noise, captions, ALPHAS, timesteps, stop_before, generator)
    torch.testing.assert_close(seen[0], trajectory.latents)
    assert not seen.requires_grad


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_ode_is_followed_as_stock_ddim_does(num_steps: int) -> None:
    teacher, captions = NoisePredictor(random_unet("tiny")).eval(), conditioning(2)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    stock = DDIMScheduler.from_config(
        noise_schedule().config, timestep_spacing="trailing", clip_sample=False
    )
    stock.set_timesteps(num_steps)
    expected = noise
    with torch.no_grad():
        for t in stock.timesteps:
            uncond, cond = (
                teacher(expected, t.expand(2), c) for c in (captions.dropped(), captions)
            )
            expected = stock.step(uncond + 2.5 * (cond - uncond), t, expected).prev_sample
    found = follow_ode(teacher, noise, captions, ALPHAS, num_steps=num_steps, guidance_scale=2.5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_ode_ends_where_the_closed_form_does() -> None:
    """For data of N(m, s^2) the ODE is linear in the noise."""
    noise = torch.linspace(-2, 2, 5)[:, None, None, None]
    found = follow_ode(
        Gaussian(2.0, 0.5), noise, Unsteered(), ALPHAS, num_steps=500, guidance_scale=1.0
    )
    a = ALPHAS[999]
    expected = 2.0 + 0.5 * (noise - a.sqrt() * 2.0) / (a * 0.25 + 1 - a).sqrt()
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_dmd_pulls_a_generator_onto_the_target_distribution() -> None:
    """A generator b + a z, a learned fake score, and the scores of N(2, 0.5^2)."""
    generator = torch.Generator().manual_seed(3)
    teacher, fake = Gaussian(2.0, 0.5), Gaussian(-1.0, 1.5)
    student = nn.Parameter(torch.tensor([-1.0, 1.5]))
    student_optimizer = torch.optim.Adam([student], lr=0.01, betas=(0.0, 0.999))
    fake_optimizer = torch.optim.Adam(fake.parameters(), lr=0.03, betas=(0.0, 0.999))
    for _ in range(600):
        z = torch.randn((64, 1, 4, 4), generator=generator)
        x0 = student[0] + student[1] * z
        for _ in range(5):
            noise, t = torch.randn(z.shape, generator=generator), draw(generator)
            loss = fake_score_loss(fake, x0, Unsteered(), ALPHAS, timesteps=t, noise=noise)
            fake_optimizer.zero_grad()
            loss["loss"].backward()
            fake_optimizer.step()
        noise, t = torch.randn(z.shape, generator=generator), draw(generator)
        student_optimizer.zero_grad()
        distribution_matching_loss(
            x0, teacher, fake, Unsteered(), ALPHAS, guidance_scale=1.0, timesteps=t, noise=noise
        ).backward()
        student_optimizer.step()
    mean, std = student.detach().tolist()
    assert mean == pytest.approx(2.0, abs=0.05)
    assert abs(std) == pytest.approx(0.5, abs=0.05)


def draw(generator: torch.Generator) -> torch.Tensor:
    return draw_timesteps(64, 0.02, 0.98, generator)


def test_a_step_of_sdxl_has_the_right_shapes_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors: three UNets with their gradients do not fit into a test's memory.

    Of its transformers' layers, which are all of one shape, each has one.
    """
    monkeypatch.setitem(SDXL_UNET, "transformer_layers_per_block", (1, 1, 1))
    with torch.device("meta"):
        teacher = NoisePredictor(random_unet("sdxl").requires_grad_(False))
        student_unet = random_unet("sdxl")
        critic = BottleneckCritic(SDXL_UNET["block_out_channels"][-1], 32)
        fake_score = FakeScore(random_unet("sdxl"), critic)
        captions = Conditioning(torch.empty(2, 77, 2048), torch.empty(2, 1280), torch.empty(2, 6))
        alphas, latents = torch.empty(1000), torch.empty(2, 4, 128, 128)
        t = torch.zeros(2, dtype=torch.int64)
        student = NoisePredictor(student_unet)
        x0 = predict_x0(student, latents, t, captions, alphas)
        losses = fake_score_loss(
            fake_score, x0, captions, alphas, timesteps=t, noise=latents, critic_weight=1e-2,
            real=latents,
        )  # fmt: skip
        losses["loss"].backward()
        loss = distribution_matching_loss(
            x0, teacher, fake_score, captions, alphas, guidance_scale=8.0, timesteps=t,
            noise=latents,
        )  # fmt: skip
        (loss + student_gan_loss(fake_score(x0, t, captions, judge=True))).backward()
    assert x0.shape == latents.shape
    assert all(p.grad is not None for p in student_unet.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_sdxls_lora_reaches_the_788_modules_of_dmd2_and_trains_nothing_else() -> None:
    with torch.device("meta"):
        unet = random_unet("sdxl")
        assert len(lora_modules(unet)) == 788
        add_lora(unet, rank=64, alpha=8.0, seed=1)
    trained = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 788
    assert all("lora_" in name for name in trained)
