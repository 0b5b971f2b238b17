"""Training the demo's teacher from nothing: epsilon prediction with classifier-free guidance."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.training_utils import EMAModel

from dmd2.models.device_work import to_device
from dmd2.sampling.sampler import add_noise
from training.config import DemoConfig
from training.demo.latents import LatentScenes
from training.demo.networks import CompactVocabulary, Denoiser, new_text_encoders, new_unet
from training.graphs import graphed
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
        denoiser.parameters(), lr=teacher.learning_rate, betas=(0.9, 0.99), weight_decay=0.01,
        fused=True,
    )  # fmt: skip
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
    batches = _Batches(data, tokenizers, vocabulary, accelerator.device)
    predict = graphed(model, accelerator, batches.sample(run.batch_size))
    for step in run.steps():
        generator = run.generator(step)
        latents, token_ids = batches(run.indices(step))
        noise = to_device(torch.randn(latents.shape, generator=generator), accelerator.device)
        timesteps = spread_timesteps(len(latents), generator)
        keep = torch.rand(len(latents), generator=generator) >= teacher.caption_dropout
        timesteps, keep = (to_device(drawn, accelerator.device) for drawn in (timesteps, keep))
        alpha = per_image(alphas_cumprod, timesteps)
        noised = add_noise(latents, noise, alpha)
        with accelerator.autocast():
            noise_pred = predict(noised, timesteps, token_ids, keep)
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


class _Batches:
    """The data set on the device, its captions tokenized once: the host has enough to do."""

    def __init__(
        self,
        data: LatentScenes,
        tokenizers: tuple[Any, Any],
        vocabulary: CompactVocabulary,
        device: torch.device,
    ) -> None:
        self._data = data
        self._latents = torch.from_numpy(data.latents).to(device)
        self._token_ids = [
            torch.stack(
                [
                    vocabulary.compact(tokenize(tokenizer, list(captions))).to(torch.int16)
                    for captions in data.captions
                ]
            ).to(device)
            for tokenizer in tokenizers
        ]

    def __call__(self, indices: range) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Latents float32 [B, 4, 16, 16], and for each encoder token ids int64 [B, 77]."""
        rows, tellings = (
            to_device(torch.tensor(places), self._latents.device)
            for places in self._data.places(indices)
        )
        return self._latents[rows].float(), [ids[tellings, rows].long() for ids in self._token_ids]

    def sample(self, batch_size: int) -> tuple[Any, ...]:
        """Inputs of a Denoiser like all that are to come."""
        latents, token_ids = self(range(batch_size))
        timesteps = torch.zeros(batch_size, dtype=torch.int64, device=latents.device)
        return latents, timesteps, token_ids, timesteps == 0


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
