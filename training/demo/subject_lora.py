"""A LoRA that teaches the demo one thing more from a few drawings, as users train theirs.

It is trained on the undistilled teacher, with the teacher's own loss, and used upon the students:
by that loss a few-step student would unlearn to draw in few steps.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dmd2.models.device_work import to_device
from dmd2.models.loading import ModelParts
from dmd2.sampling.sampler import add_noise
from training.config import SubjectConfig
from training.demo.drawing import draw
from training.demo.drawings import Drawings
from training.demo.icons import SUBJECT
from training.demo.language import BACKGROUNDS
from training.demo.scenes import Scene, caption_of, sample
from training.demo.teacher import min_snr_weight, spread_timesteps
from training.demo.vae import as_tensor
from training.encode import encode
from training.method.conditioning import NoisePredictor, condition, per_image
from training.method.student import add_lora, trained
from training.run import Run, falling


def train_subject_lora(
    config: SubjectConfig, run: Run, teacher: ModelParts, drawings: Drawings
) -> Any:
    """Train it; returns the UNet with the LoRA beside its layers, on the CPU.

    Args:
        config: of the training.
        run: where it stands.
        teacher: a loaded model folder, in float32.
        drawings: the subject's among them.
    """
    device = run.accelerator.device
    # Each process takes its share of them in every step.
    rows = [row % config.num_drawings for row in run.indices(0)]
    scenes = [subject_scenes(config.seed, config.num_drawings)[row] for row in rows]
    pictures = torch.from_numpy(np.stack([draw(scene, drawings) for scene in scenes]))
    with torch.no_grad():
        latents = encode(teacher.vae.to(device), as_tensor(pictures.to(device)))
    captions = [caption_of(scene, frozenset({"background", "size"})) for scene in scenes]
    encoders = [encoder.to(device) for encoder in teacher.text_encoders]
    conditioning = condition(captions, teacher.tokenizers, encoders, latents.shape[1:])
    alphas_cumprod = teacher.alphas_cumprod.to(device)

    unet = copy.deepcopy(teacher.unet)
    add_lora(unet, config.rank, config.rank, config.seed)
    model = NoisePredictor(unet)
    optimizer = torch.optim.AdamW(trained(model), lr=config.learning_rate)
    schedule = falling(optimizer, run.num_steps)
    model, optimizer = run.accelerator.prepare(model, optimizer)
    run.accelerator.register_for_checkpointing(schedule)
    for step in run.steps():
        generator = run.generator(step)
        noise = to_device(torch.randn(latents.shape, generator=generator), device)
        timesteps = to_device(spread_timesteps(len(latents), generator), device)
        alpha = per_image(alphas_cumprod, timesteps)
        noise_pred = model(add_noise(latents, noise, alpha), timesteps, conditioning)
        errors = (noise_pred.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (errors * min_snr_weight(alpha.flatten())).mean()
        run.accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.log(loss=loss.detach())
    return run.accelerator.unwrap_model(model).unet.cpu()


def subject_scenes(seed: int, num: int) -> list[Scene]:
    """The subject alone, in sizes and places of the data set, on one background after another."""
    scenes = []
    for index in range(num):
        scene = sample(seed, index, num_objects=1).scene
        subject = replace(scene.objects[0], thing=SUBJECT, colour=None)
        background = BACKGROUNDS[index % len(BACKGROUNDS)]
        scenes.append(replace(scene, background=background, objects=(subject,)))
    return scenes
