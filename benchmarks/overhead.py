"""What the engine and the sampler cost beside the models: milliseconds for a unit of work.

    scripts/lib/python benchmarks/overhead.py [--sizes 64,1024] [--images 1,8] [--units 500]

The models do nothing: the UNet returns its latents, the decoder a picture of 8x8 pixels whatever
the size. So a unit of work, which is one step of so many images or their decode, takes what the
engine does around it: scheduling, batching, the sampler's arithmetic, noise for new images, and
handing finished ones to the threads that save. thread_ms is the processor's time of the engine's
thread, wall_ms what passes on the clock, with the threads that save beside it. The aims, 0.5 ms for
one image and 2 ms for eight, are of thread_ms at 64x64 pixels: at 1024x1024 drawing noise and the
arithmetic come on top, of which a GPU takes the latter. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from full_size import device_name
from torch import nn

from dmd2 import __version__
from dmd2.engine.batch_limits import BatchLimits
from dmd2.engine.engine import Engine
from dmd2.model_card import SDXL_TIMESTEPS, ModelCard
from dmd2.models.loading import ModelParts
from dmd2.models.text_encoder import TextEmbeds, TextEncoder
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraUse
from dmd2.sampling.pipeline import Pipeline

AIMS_MS = {1: 0.5, 8: 2.0}
AIMED_SIZE = 64
_ROUNDS = 3


class IdleUNet(nn.Module):
    """Predicts that the latents are noise alone."""

    config = SimpleNamespace(in_channels=4)
    device = torch.device("cpu")
    dtype = torch.float32

    def forward(self, latents: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        """The latents, as they are."""
        return (latents,)


class IdleDecoder:
    """Decodes to a grey picture of 8x8 pixels."""

    config = FrozenDict(block_out_channels=(8, 8, 8, 8), scaling_factor=1.0)
    device = torch.device("cpu")
    dtype = torch.float32

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        """float32 [B, 3, 8, 8]."""
        return (torch.zeros(len(latents), 3, 8, 8),)


class IdleTextEncoder(TextEncoder):
    """Knows every prompt already."""

    def __init__(self) -> None:
        self.embeds = TextEmbeds(torch.zeros(1, 77, 2048), torch.zeros(1, 1280))

    def encode(self, prompts: Sequence[str], loras: Sequence[LoraUse] = ()) -> list[TextEmbeds]:
        """The same for each."""
        return [self.embeds] * len(prompts)


def main() -> None:
    """Measure each size and number of images; print the table and the JSON."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--sizes", type=numbers, default=[AIMED_SIZE, 1024], help="sides in pixels; 64,1024")
    add("--images", type=numbers, default=list(AIMS_MS), help="of a unit of work; 1,8")
    add("--units", type=int, default=500, help="of work, in each of three rounds; 500")
    options = parser.parse_args()
    rows = [row(size, images, options.units) for size in options.sizes for images in options.images]
    print("|", " | ".join(rows[0]), "|")
    print("|---" * len(rows[0]) + "|")
    for each in rows:
        print("|", " | ".join("-" if v is None else f"{v:g}" for v in each.values()), "|")
    report = {
        "benchmark": "overhead",
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(torch.device("cpu")),
        "cpus": os.cpu_count(),
        "versions": {
            "dmd2": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "rows": rows,
    }
    print(json.dumps(report))


def numbers(text: str) -> list[int]:
    """The whole numbers in a text such as 1,8."""
    return [int(number) for number in text.split(",")]


def row(size: int, images: int, units: int) -> dict[str, Any]:
    """The median of a few rounds, after a short one that warms up."""
    pipeline = idle_pipeline(size)
    with tempfile.TemporaryDirectory() as outputs:
        engine = Engine(pipeline, Path(outputs), limits=BatchLimits(images, images))
        unit_ms(engine, images, units=20)
        rounds = [unit_ms(engine, images, units) for _ in range(_ROUNDS)]
        engine.close()
    thread_ms, wall_ms = (round(median(each), 4) for each in zip(*rounds, strict=True))
    return {
        "size": size,
        "images": images,
        "thread_ms": thread_ms,
        "wall_ms": wall_ms,
        "aim_ms": AIMS_MS.get(images) if size == AIMED_SIZE else None,
    }


def idle_pipeline(size: int) -> Pipeline:
    """A pipeline whose models do nothing, at size x size pixels."""
    card = ModelCard("idle", SDXL_TIMESTEPS, (size, size), fast_decoder=None, safety_checker=None)
    parts = ModelParts(
        tokenizers=(None, None),
        text_encoders=(nn.Identity(), nn.Identity()),
        unet=IdleUNet(),
        vae=IdleDecoder(),
        alphas_cumprod=torch.linspace(0.999, 0.005, 1000),
        zeros_for_empty=True,
    )
    pipeline = Pipeline(card, parts)
    pipeline._text_encoder = IdleTextEncoder()
    return pipeline


def unit_ms(engine: Engine, images: int, units: int) -> tuple[float, float]:
    """Milliseconds for each unit of about so many, of the engine's thread and on the clock.

    The requests are all there from the start. An image takes a step for each timestep, and a
    decode.
    """
    each = len(SDXL_TIMESTEPS[4]) + 1
    requests = [
        GenerationRequest.resolve(engine.card, prompt="a red circle", seed=seed)
        for seed in range(max(1, units // each) * images)
    ]
    thread = time.pthread_getcpuclockid(engine._thread.ident or 0)
    began, busy = time.perf_counter(), time.clock_gettime(thread)
    results = [future.result() for future in [engine.submit(request) for request in requests]]
    seconds = time.clock_gettime(thread) - busy, time.perf_counter() - began
    # Where not all came together, there were more units: so many as say what they shared.
    steps = sum(1 / size for result in results for size in result.batch_sizes)
    thread_ms, wall_ms = (1000 * each_s / (steps * each / (each - 1)) for each_s in seconds)
    return thread_ms, wall_ms


if __name__ == "__main__":
    main()
