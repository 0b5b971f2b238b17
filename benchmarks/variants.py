"""What ways to call the UNet, and to embed a prompt, bring: medians of calls that take turns.

    scripts/lib/python benchmarks/variants.py [--model demo] [--batches 1,2,4,8] [--calls 60]

  plain                  as the engine calls it
  channels_last          weights and activations in that memory format
  fused projections      query, key and value of self-attention in one multiplication
  compiled               torch.compile
  compiled, channels_last    as with DMD2_COMPILE=1

A model is a manifest entry that is installed, or a folder; each variant has a copy of its own in
memory. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import diffusers
import torch
from full_size import device_name

from dmd2 import __version__
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.settings import ROOT
from dmd2.store.manifest import locate

VARIANTS: dict[str, Callable[[Pipeline], object]] = {
    "plain": lambda pipeline: None,
    "channels_last": lambda pipeline: to_channels_last(pipeline),
    "fused projections": lambda pipeline: pipeline._unet.fuse_qkv_projections(),
    "compiled": lambda pipeline: pipeline._unet.compile(fullgraph=True),
    "compiled, channels_last": lambda pipeline: pipeline.compile(),
}


def main() -> None:
    """Load a pipeline for each variant, let them take turns, print the table and the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", metavar="NAME|FOLDER")
    parser.add_argument("--batches", default="1,2,4,8", help="images at once")
    parser.add_argument("--calls", type=int, default=60, help="measured calls of each variant")
    options = parser.parse_args()
    folder = locate(options.model, ROOT / "weights")
    pipelines = {name: prepared(folder, change) for name, change in VARIANTS.items()}
    rows = {}
    for batch in map(int, options.batches.split(",")):
        for pipeline in pipelines.values():
            step_seconds(pipeline, batch)
        seconds: dict[str, list[float]] = {name: [] for name in pipelines}
        while len(seconds["plain"]) < options.calls:
            for name, pipeline in pipelines.items():
                seconds[name] += step_seconds(pipeline, batch)
        rows[batch] = {name: 1000 * median(values) for name, values in seconds.items()}
    print("| images |", " | ".join(f"{name}, ms" for name in VARIANTS), "|")
    for batch, row in rows.items():
        cells = (f"{ms:.1f} ({ms / row['plain']:.2f})" for ms in row.values())
        print(f"| {batch} |", " | ".join(cells), "|")
    new_ms, known_ms = prompt_ms(pipelines["plain"])
    print(f"a prompt: {new_ms:.2f} ms new, {known_ms:.2f} ms known")
    report = {
        "benchmark": "variants",
        "date": time.strftime("%Y-%m-%d"),
        "model": options.model,
        "device": device_name(pipelines["plain"].device),
        "cpus": os.cpu_count(),
        "dtype": str(pipelines["plain"].dtype),
        "versions": {
            "dmd2": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "step_ms": rows,
        "prompt_ms": {"new": new_ms, "known": known_ms},
    }
    print(json.dumps(report))


def prepared(folder: Path, change: Callable[[Pipeline], object]) -> Pipeline:
    """The model, changed."""
    pipeline = Pipeline.load(folder)
    change(pipeline)
    return pipeline


def to_channels_last(pipeline: Pipeline) -> None:
    """Convolutions' weights channels last; their results follow."""
    pipeline._unet.to(memory_format=torch.channels_last)


def step_seconds(pipeline: Pipeline, batch: int) -> list[float]:
    """Seconds of each step of a batch."""
    request = GenerationRequest.resolve(pipeline.card, prompt="a red circle", seed=7)
    (conditioning,) = pipeline.encode([request])
    samples = [pipeline.start(request, 0, conditioning) for _ in range(batch)]
    return [timed(pipeline, lambda: pipeline.step(samples)) for _ in request.timesteps]


def prompt_ms(pipeline: Pipeline) -> tuple[float, float]:
    """Milliseconds to embed a new prompt, and one that is known."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(30):
        request = GenerationRequest.resolve(pipeline.card, prompt=f"{number} red circles", seed=7)
        for each in seconds:
            each.append(timed(pipeline, lambda request=request: pipeline.encode([request])))
    return 1000 * median(seconds[0]), 1000 * median(seconds[1])


def timed(pipeline: Pipeline, run: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    pipeline.mark()()
    started = time.perf_counter()
    run()
    pipeline.mark()()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
