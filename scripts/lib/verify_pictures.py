"""The same pictures by stock diffusers and by this engine, and how far apart they are."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from dmd2.engine.engine import Engine
from dmd2.engine.job import GenerationResult
from dmd2.engine.opening import open_engine
from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest
from dmd2.settings import Settings

# README's, for a model that draws what it is asked to.
PROMPTS = (
    "A crowded Moroccan market street at sunset, lanterns lit over stalls of spices and carpets, "
    "warm dust in the air",
    "Deep under water, the wreck of a pirate ship overgrown with coral, sunbeams from above, a "
    "school of silver fish",
    "A steampunk airship of brass and canvas drifting over a foggy Victorian city, chimneys and "
    "clock towers below",
    "Portrait of an old fisherman with a white beard and a yellow oilskin, rain, soft light from "
    "the left",
    "A small fox asleep in fresh snow under a birch tree, first morning light, long shadows",
)
# For the bundled demo, which knows few words.
DEMO_PROMPTS = (
    "a red circle on a blue background",
    "a small green star at the top, on a black background",
    "a cat and a dog on a meadow",
    "a large moon at night",
    "a robot in the desert",
)
# What psnr is where no pixel differs; one value of five megapixels that is off by one is 120.
IDENTICAL_DB = 150.0

Pictures = Sequence[NDArray[np.uint8]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Made:
    """Pictures by this engine.

    Attributes:
        pictures: uint8 [H, W, 3] each, one for each request.
        results: of the requests.
    """

    pictures: Pictures
    results: Sequence[GenerationResult]


def requests_of(card: ModelCard, prompts: Sequence[str]) -> list[GenerationRequest]:
    """One image of the model's own size for each prompt, each with a seed of its own."""
    return [
        GenerationRequest.resolve(card, prompt=prompt, seed=seed)
        for seed, prompt in enumerate(prompts, 7)
    ]


def by_stock(
    folder: Path, device: str, dtype: str, requests: Sequence[GenerationRequest]
) -> Pictures:
    """Stock diffusers' pictures, by its own SDXL pipeline with its own LCMScheduler."""
    diffusers_logging.set_verbosity_error()  # it warns at every call that is given timesteps
    diffusers_logging.disable_progress_bar()
    disable_progress_bar()
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    return [
        np.asarray(
            pipe(
                request.prompt,
                width=request.width,
                height=request.height,
                timesteps=list(request.timesteps),
                guidance_scale=0.0,
                generator=torch.Generator("cpu").manual_seed(request.seed),
            ).images[0]
        )
        for request in requests
    ]


def by_us(settings: Settings, requests: Sequence[GenerationRequest]) -> Made:
    """The pictures by an engine as it serves, one after the other."""
    return with_engine(settings, lambda engine: made_by(engine, requests))


def with_engine(settings: Settings, use: Callable[[Engine], Result]) -> Result:
    """What use gives, of an engine that is closed and gone afterwards."""
    engine = open_engine(settings)
    try:
        return use(engine)
    finally:
        engine.close()
        if settings.compile:  # it ended compiling for this process, and the next has to compile
            torch.compiler.reset()
            torch.compiler.set_stance("default")


def made_by(engine: Engine, requests: Sequence[GenerationRequest]) -> Made:
    """The pictures by an engine, one after the other."""
    results = [engine.submit(request).result() for request in requests]
    return Made([pixels_of(result.paths[0]) for result in results], results)


def pixels_of(path: Path) -> NDArray[np.uint8]:
    """A file's, uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def psnr(pictures: Pictures, others: Pictures) -> float:
    """The peak signal-to-noise ratio of all pictures together, in dB; 150 where they are equal."""
    squares = [np.square(a.astype(float) - b).mean() for a, b in zip(pictures, others, strict=True)]
    mean = float(np.mean(squares))
    return IDENTICAL_DB if mean == 0 else round(10 * math.log10(255**2 / mean), 2)


def largest(pictures: Pictures, others: Pictures) -> int:
    """The largest difference of any value of any pixel, 0 to 255."""
    pairs = zip(pictures, others, strict=True)
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs)


def give_back_memory() -> None:
    """What nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
