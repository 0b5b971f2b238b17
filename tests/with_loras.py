"""Requests with LoRAs, what an engine makes of them, and what stock diffusers does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler
from model_folders import pixels_of
from numpy.typing import NDArray

from dmd2.engine.engine import Engine
from dmd2.loras.names import MODEL_PARTS
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraUse
from dmd2.sampling.pipeline import Pipeline


def request(engine: Engine | Pipeline, *loras: LoraUse, **inputs: Any) -> GenerationRequest:
    given = {"prompt": "a red circle", "seed": 7, **inputs}
    return replace(GenerationRequest.resolve(engine.card, **given), loras=loras)


def pictures(engine: Engine, asked: GenerationRequest) -> list[NDArray[np.int16]]:
    return [pixels_of(path) for path in engine.submit(asked).result().paths]


def stock_picture(
    pipe: Any,
    asked: GenerationRequest,
    scales: Mapping[Path, float],
    how: str = "set_adapters",
) -> NDArray[np.int16]:
    """A request's first image by stock diffusers with LoRA files at their scales, int16 [H, W, 3].

    Args:
        pipe: is changed.
        asked: its own LoRAs are not read.
        scales: by file.
        how: "set_adapters", or "fuse_lora" after it.
    """
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    for path in scales:
        pipe.load_lora_weights(path, adapter_name=path.stem)
    names = [path.stem for path in scales]
    if scales:
        pipe.set_adapters(names, list(scales.values()))
    if how == "fuse_lora":
        pipe.fuse_lora(components=list(MODEL_PARTS), adapter_names=names)
    image = pipe(
        asked.prompt,
        width=asked.width,
        height=asked.height,
        timesteps=list(asked.timesteps),
        guidance_scale=0.0,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
    ).images[0]
    return np.asarray(image).astype(np.int16)
