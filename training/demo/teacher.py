"""Training the demo's teacher from nothing: epsilon prediction with classifier-free guidance."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.training_utils import EMAModel

from dmd2.sampling.sampler import add_noise
from training.config import DemoConfig
from training.demo.latents import LatentScenes
from training.demo.networks import CompactVocabulary, Denoiser, new_text_encoders, new_unet
from training.method.conditioning import per_image, tokenize
from training.run import Run, warm_up_and_decay


def train_teacher(
    config: DemoConfig,
    run: Run,
    data: LatentScenes,
    tokenizers: tuple[Any, Any],
    alphas_cumprod: torch.Tensor,
) -> Denoiser:
    """Train a UNet and its text encoders; returns their moving average.

    Args:
        config: of the model and its training.
        run: where it stands.
        data: of the same seed's scenes.
        tokenizers: SDXL's two.
        alphas_cumprod: float32 [1000].
    """
    torch.manual_seed(config.seed)
    vocabulary = CompactVocabulary(tokenizers[0])
    denoiser = Denoiser(new_unet(config), new_text_encoders(config, vocabulary.size))
    teacher, accelerator = config.teacher, run.accelerator
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=teacher.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warm_up_and_decay(teacher.num_steps, teacher.num_warm_up_steps)
    )
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    average = EMAModel(
        model.parameters(), decay=teacher.ema_decay, use_ema_warmup=True, inv_gamma=10, power=0.8,
        foreach=True,
    )  # fmt: skip
    average.to(accelerator.device)
    accelerator.register_for_checkpointing(schedule, average)
    alphas_cumprod = alphas_cumprod.to(accelerator.device)
    for step in run.steps():
        generator = run.generator(step)
        latents, captions = data.batch(run.indices(step))
        noise = torch.randn(latents.shape, generator=generator).to(accelerator.device)
        timesteps = spread_timesteps(len(latents), generator).to(accelerator.device)
        keep = torch.rand(len(latents), generator=generator) >= teacher.caption_dropout
        token_ids = [
            vocabulary.compact(tokenize(tokenizer, captions)).to(accelerator.device)
            for tokenizer in tokenizers
        ]
        alpha = per_image(alphas_cumprod, timesteps)
        noised = add_noise(latents.to(accelerator.device), noise, alpha)
        with accelerator.autocast():
            noise_pred = model(noised, timesteps, token_ids, keep.to(accelerator.device))
        errors = (noise_pred.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (errors * min_snr_weight(alpha.flatten())).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        run.log(loss=loss.detach(), error=errors.detach().mean())
    average.copy_to(model.parameters())
    teacher_model: Denoiser = accelerator.unwrap_model(model)
    return teacher_model


def spread_timesteps(num: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps of 0..999, one from each of num equal parts, in random order: int64 [num].

    Each is uniform by itself; together they cover the range, so that the loss is less noisy.
    """
    parts = (torch.arange(num) + torch.rand(num, generator=generator)) / num
    order = torch.randperm(num, generator=generator)
    return (parts * 1000).long().clamp(max=999)[order]


def min_snr_weight(alpha_cumprod: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """min(SNR, gamma) / SNR for epsilon prediction (arXiv 2303.09556, section 3.4)."""
    snr = alpha_cumprod / (1 - alpha_cumprod)
    return snr.clamp(max=gamma) / snr
