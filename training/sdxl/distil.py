"""Distilling SDXL, or a checkpoint made from it, with the published settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from dmd2.model_card import ModelCard
from dmd2.models.loading import ModelParts, load_parts
from dmd2.store.saving import save_weights
from training.config import (
    ONE_STEP,
    SDXL_FULL,
    SDXL_LORA,
    SDXL_ONE_STEP_STEPS,
    SDXL_WARM_START,
    DistillConfig,
)
from training.method.distillation import Distillation, Pairs
from training.method.student import write_lora
from training.method.warm_start import WarmStart
from training.model_folder import write_student_folder
from training.run import Run
from training.sdxl.pairs import CaptionedFolder


def sdxl_config(*, lora: bool, one_step: bool) -> DistillConfig:
    """The published settings of a student, with pure noise at t = 399 for one of one step."""
    config = SDXL_LORA if lora else SDXL_FULL
    if not one_step:
        return config
    return replace(
        config,
        timesteps=ONE_STEP,
        num_steps=SDXL_ONE_STEP_STEPS,
        warm_start=SDXL_WARM_START,
    )


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
    start = _warm_start(config, runs / "warm-start", parts, pairs)
    unet = Distillation(config, run, parts, pairs, start).train()
    result = runs / ("lora.safetensors" if config.lora_rank else "model")
    if accelerator.is_main_process:
        _write(unet, result, teacher, config, size)
    accelerator.wait_for_everyone()
    return result


def _warm_start(
    config: DistillConfig, folder: Path, teacher: ModelParts, pairs: Pairs
) -> dict[str, torch.Tensor] | None:
    if config.warm_start is None:
        return None
    weights = folder / "student.safetensors"
    if not weights.exists():
        run = Run(
            Accelerator(),  # its own: what one has prepared goes into all its checkpoints
            folder,
            num_steps=config.warm_start.num_steps,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        student = WarmStart(config, run, teacher, pairs).train()
        if student is not None:
            save_weights(student, weights)
        run.accelerator.wait_for_everyone()
    return load_file(weights)


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
