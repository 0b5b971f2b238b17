"""DMD2's training loop: a few-step student from a diffusion model (arXiv 2405.14867)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from dmd2.models.loading import ModelParts
from dmd2.sampling.sampler import add_noise
from training.config import DistillConfig
from training.method.backward_simulation import simulate
from training.method.conditioning import (
    Conditioning,
    NoisePredictor,
    condition,
    per_image,
    predict_x0,
)
from training.method.discriminator import BottleneckCritic, student_gan_loss
from training.method.distribution_matching import distribution_matching_loss, draw_timesteps
from training.method.fake_score import FakeScore, fake_score_loss
from training.method.student import as_student, trained
from training.run import Run, falling


class Pairs(Protocol):
    """Captioned images in latent space."""

    def batch(self, indices: range) -> tuple[torch.Tensor, list[str]]:
        """Latents float32 [B, 4, H/8, W/8] of about unit variance, and their captions."""

    def caption(self, index: int) -> str:
        """The caption alone."""


@dataclass(frozen=True)
class _Part:
    """As many images of a step as a pass takes at once.

    Attributes:
        inputs: what the student starts from, x_t at timesteps, float32 [B, 4, H/8, W/8].
        timesteps: int64 [B].
        conditioning: of the captions.
        real: the data's images for the captions.
        x0: what the student makes of inputs, without a graph.
    """

    inputs: torch.Tensor
    timesteps: torch.Tensor
    conditioning: Conditioning
    real: torch.Tensor
    x0: torch.Tensor


class Distillation:
    """A teacher, its student, and the fake score network between them.

    Args:
        config: of the distillation.
        run: where it stands.
        teacher: a loaded model folder, in float32.
        data: captions to distil on, and images for the GAN.
        start: the student's first weights, of a WarmStart; None for the teacher's.
    """

    def __init__(
        self,
        config: DistillConfig,
        run: Run,
        teacher: ModelParts,
        data: Pairs,
        start: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._config, self._run, self._data = config, run, data
        self._accelerator = run.accelerator
        device = run.accelerator.device
        self._tokenizers = teacher.tokenizers
        self._encoders = [encoder.to(device) for encoder in teacher.text_encoders]
        self._alphas_cumprod = teacher.alphas_cumprod.to(device)

        self._schedules: list[Any] = []
        self._new_unet = partial(type(teacher.unet).from_config, teacher.unet.config)
        student = as_student(copy.deepcopy(teacher.unet), config)
        if start is not None:
            student.load_state_dict(start)
        torch.manual_seed(config.seed)
        has_critic = config.gan_weight > 0
        num_channels = teacher.unet.config.block_out_channels[-1]
        critic = BottleneckCritic(num_channels) if has_critic else None
        fake_score = FakeScore(copy.deepcopy(teacher.unet).requires_grad_(True), critic)

        self._student, self._student_optimizer = self._prepare(
            NoisePredictor(student), config.student_learning_rate
        )
        self._fake_score, self._fake_optimizer = self._prepare(
            fake_score, config.fake_learning_rate
        )
        self._teacher = self._accelerator.prepare_model(
            NoisePredictor(teacher.unet.requires_grad_(False)), evaluation_mode=True
        )
        self._average: EMAModel | None = None
        if config.ema_decay is not None:
            self._average = EMAModel(
                trained(self._student), decay=config.ema_decay, use_ema_warmup=True, foreach=True
            )
            self._average.to(device)
            self._accelerator.register_for_checkpointing(self._average)

    def _prepare(self, model: nn.Module, learning_rate: float) -> tuple[nn.Module, Any]:
        """A model and its optimizer, as DMD2's published code has it, with a falling rate."""
        optimizer = torch.optim.AdamW(
            trained(model), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.01
        )
        schedule = falling(optimizer, self._config.num_steps)
        self._accelerator.register_for_checkpointing(schedule)
        self._schedules.append(schedule)
        prepared: tuple[nn.Module, Any] = self._accelerator.prepare(model, optimizer)
        return prepared

    def train(self) -> Any | None:
        """Take the steps that are left.

        Returns:
            In the main process the student's UNet on the CPU, with its averaged weights where
            there is an average, and with its LoRA beside the layers if it has one; else None.
        """
        config = self._config
        for step in self._run.steps():
            generator = self._run.generator(step)
            parts = self._parts(step, generator)
            for _ in range(config.num_fake_updates):
                losses = (self._fake_loss(part, generator) for part in parts)
                self._update(self._fake_score, self._fake_optimizer, losses, len(parts))
            self._fake_score.requires_grad_(False)
            losses = (self._student_loss(part, generator) for part in parts)
            self._update(self._student, self._student_optimizer, losses, len(parts))
            self._fake_score.requires_grad_(True)
            for schedule in self._schedules:
                schedule.step()
            if self._average is not None:
                self._average.step(trained(self._student))
        if self._average is not None:
            self._average.copy_to(trained(self._student))
        weights = self._accelerator.get_state_dict(self._student)
        if not self._accelerator.is_main_process:
            return None
        unet = as_student(self._new_unet(), config)
        unet.load_state_dict({k.removeprefix("unet."): w.cpu() for k, w in weights.items()})
        return unet

    def _parts(self, step: int, generator: torch.Generator) -> list[_Part]:
        """This step's captions, and the images that the student makes for them.

        Which of the student's steps is trained is the same for all processes, which under FSDP
        must all do the same passes.
        """
        config, device = self._config, self._accelerator.device
        latents, captions = self._data.batch(self._run.indices(step))
        size = config.micro_batch_size or len(latents)
        number = int(np.random.default_rng([config.seed, step]).integers(len(config.timesteps)))
        parts = []
        for first in range(0, len(latents), size):
            real = latents[first : first + size].to(device)
            conditioning = condition(
                captions[first : first + size], self._tokenizers, self._encoders, real.shape[1:]
            )
            parts.append(self._part(real, conditioning, number, generator))
        return parts

    @torch.no_grad()
    def _part(
        self,
        real: torch.Tensor,
        conditioning: Conditioning,
        number: int,
        generator: torch.Generator,
    ) -> _Part:
        timesteps = self._config.timesteps
        t = torch.full((len(real),), timesteps[number], device=real.device)
        noise = self._noise_like(real, generator)
        if self._config.backward_simulation or number == 0:
            inputs = simulate(
                self._student, noise, conditioning, self._alphas_cumprod, timesteps, number,
                generator,
            )  # fmt: skip
        else:
            inputs = add_noise(real, noise, per_image(self._alphas_cumprod, t))
        x0 = predict_x0(self._student, inputs, t, conditioning, self._alphas_cumprod)
        return _Part(inputs, t, conditioning, real, x0)

    def _fake_loss(self, part: _Part, generator: torch.Generator) -> torch.Tensor:
        losses = fake_score_loss(
            self._fake_score,
            part.x0,
            part.conditioning,
            self._alphas_cumprod,
            timesteps=self._timesteps(part, 0.0, 1.0, generator),
            noise=self._noise_like(part.x0, generator),
            critic_weight=self._config.critic_weight,
            real=part.real if self._config.gan_weight > 0 else None,
        )
        loss = losses.pop("loss")
        self._run.log(**{name: value.detach() for name, value in losses.items()})
        return loss

    def _student_loss(self, part: _Part, generator: torch.Generator) -> torch.Tensor:
        config = self._config
        x0 = predict_x0(
            self._student, part.inputs, part.timesteps, part.conditioning, self._alphas_cumprod
        )
        loss = distribution_matching_loss(
            x0,
            self._teacher,
            self._fake_score,
            part.conditioning,
            self._alphas_cumprod,
            guidance_scale=config.guidance_scale,
            timesteps=self._timesteps(part, *config.score_range, generator),
            noise=self._noise_like(x0, generator),
        )
        self._run.log(distribution_matching=loss.detach())
        if config.gan_weight > 0:
            t = self._timesteps(part, 0.0, 1.0, generator)
            alpha = per_image(self._alphas_cumprod, t)
            noised = add_noise(x0, self._noise_like(x0, generator), alpha)
            with self._accelerator.no_sync(self._fake_score):
                logits = self._fake_score(noised, t, part.conditioning, judge=True)
            gan = student_gan_loss(logits)
            self._run.log(gan=gan.detach())
            loss = loss + config.gan_weight * gan
        return loss

    def _update(
        self, model: nn.Module, optimizer: Any, losses: Iterator[torch.Tensor], num_losses: int
    ) -> None:
        """One step of an optimizer on the mean of the losses, each made and used up in turn.

        DDP and FSDP exchange gradients in the last backward pass alone, and decide so in the
        forward pass that makes its loss.
        """
        for number in range(1, num_losses + 1):
            is_last = number == num_losses
            with nullcontext() if is_last else self._accelerator.no_sync(model):
                self._accelerator.backward(next(losses) / num_losses)
        self._accelerator.clip_grad_norm_(trained(model), self._config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def _timesteps(
        self, part: _Part, low: float, high: float, generator: torch.Generator
    ) -> torch.Tensor:
        return draw_timesteps(len(part.x0), low, high, generator).to(part.x0.device)

    def _noise_like(self, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(latents.shape, generator=generator).to(latents.device)
