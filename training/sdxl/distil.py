"""Distilling SDXL, or a checkpoint made from it, with the published settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dmd2.model_card import ModelCard
from dmd2.models.loading import load_parts
from training.config import ONE_STEP, SDXL_FULL, SDXL_LORA, DistillConfig
from training.method.distillation import Distillation
from training.method.student import write_lora
from training.model_folder import write_student_folder
from training.run import Run
from training.sdxl.pairs import CaptionedFolder


def sdxl_config(*, lora: bool, one_step: bool) -> DistillConfig:
    """The published settings of a student, with pure noise at t = 399 for one of one step."""
    config = SDXL_LORA if lora else SDXL_FULL
    return replace(config, timesteps=ONE_STEP) if one_step else config


def distil_sdxl(
    config: DistillConfig,
    accelerator: Accelerator,
    *,
    teacher: Path,
    data: Path,
    runs: Path,
    size: int = 1024,
) -> Path:
    """Distil a model folder.

    Args:
        config: of the distillation.
        accelerator: as `accelerate launch` set it up.
        teacher: a model folder in diffusers' layout, undistilled.
        data: pictures with captions beside them, see CaptionedFolder.
        runs: the run's folder; a run that was killed goes on.
        size: of the pictures in pixels; SDXL's own is 1024.

    Returns:
        A model folder that the container loads, or a LoRA file in kohya's layout.
    """
    parts = load_parts(teacher, torch.device("cpu"), torch.float32)
    parts.vae.to(accelerator.device).eval()
    run = Run(
        accelerator,
        runs,
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    pairs = CaptionedFolder(data, parts.vae, size, config.seed)
    unet = Distillation(config, run, parts, pairs).train()
    result = runs / ("lora.safetensors" if config.lora_rank else "model")
    if accelerator.is_main_process:
        _write(unet, result, teacher, config, size)
    accelerator.wait_for_everyone()
    return result


def _write(unet: Any, result: Path, teacher: Path, config: DistillConfig, size: int) -> None:
    if config.lora_rank:
        write_lora(unet, result)
        return
    card = {
        "name": f"{ModelCard.read(teacher).name}-{len(config.timesteps)}step",
        "timesteps": {str(len(config.timesteps)): list(config.timesteps)},
        "default_size": [size, size],
    }
    write_student_folder(result, teacher, unet, card)
