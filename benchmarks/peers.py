"""One image from prompt to PNG bytes, per stage and per batch: dmd2 against stock diffusers.

    scripts/lib/python benchmarks/peers.py [--model sdxl] [--peers ours,diffusers] [--batches 1,2]

The contenders share one process, one model folder and one dtype (float16 on CUDA, else float32):

  ours               dmd2's Pipeline with the ways that setup chooses, then image_io
  ours-plain         the same with DMD2_TUNE=off
  ours-compile       the same with DMD2_COMPILE=1
  diffusers          StableDiffusionXLPipeline with LCMScheduler, eager; Pillow's default PNG
  diffusers-compile  the same, UNet and VAE decoder in channels_last and under torch.compile
  attention-slicing  the same, set up as a well-known DMD2 container was: attention slicing (which
                     its fused projections undo), VAE sliced, tiled and in float32

Each batch size begins with a warm-up of every contender, compiling included; then they take turns
at the same prompts and seeds. No prompt comes twice, so that no cache answers, and the device ends
a stage before the next begins: what dmd2's engine overlaps does not show. All are in memory at once
(SDXL in float16: 7 GB each); where that is too much, take fewer with --peers. The random model
weights/random-sdxl (7 GB) is made on first use and kept. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from contenders import PEERS, STAGES, Contender, Requests, Run
from full_size import device_name
from numpy.typing import NDArray
from PIL import Image
from random_model import write_random_model

import dmd2
from dmd2.errors import DeviceMemoryError
from dmd2.model_card import ModelCard
from dmd2.models.loading import choose_device, choose_dtype
from dmd2.request.generation_request import GenerationRequest
from dmd2.settings import ROOT

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Load all contenders, measure them batch size by batch size; print the table and the JSON."""
    options = parse_options(arguments)
    device = choose_device(options.device)
    diffusers.logging.set_verbosity_error()  # it warns at every call that is given timesteps
    with tempfile.TemporaryDirectory() as scratch:
        folder = settle_model(options.model, Path(scratch))
        contenders = [Contender(name, folder, device) for name in options.peers]
        card, seeds = ModelCard.read(folder), count()
        rows = []
        for batch in options.batches:
            draw = partial(draw_requests, card, batch, options.size, seeds)
            rows += measure(contenders, draw(), [draw() for _ in range(options.repeats)])
    print_table(rows)
    report = {
        "benchmark": "peers",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device_name(device),
        "cpus": os.cpu_count(),
        "dtype": str(choose_dtype("auto", device)),
        "versions": {m.__name__: m.__version__ for m in (dmd2, torch, diffusers)},
        "options": vars(options),
        "rows": rows,
    }
    print(json.dumps(report))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what it leaves out depends on the machine."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    is_cuda = choose_device("auto").type == "cuda"
    model, batches = ("sdxl", "1,2,4,8") if is_cuda else ("tiny", "1")
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--model", default=model, metavar="tiny|sdxl|FOLDER", help=f"by default {model} here")
    add("--peers", default=",".join(PEERS), help="by default all")
    add("--batches", default=batches, help=f"images at once; by default {batches} here")
    add("--size", type=int, help="side of the square, in pixels; by default the model's own")
    add("--repeats", type=int, default=5, help="measured batches, of which medians are taken")
    options = parser.parse_args(arguments)
    options.peers = options.peers.split(",")
    options.batches = [int(batch) for batch in options.batches.split(",")]
    if options.repeats < 1 or min(options.batches) < 1:
        parser.error("--repeats and --batches take numbers from 1")
    if set(options.peers) - set(PEERS):
        parser.error(f"--peers takes {','.join(PEERS)}")
    return options


def settle_model(model: str, scratch: Path) -> Path:
    """The folder that --model means; a random model is written where it is missing."""
    made = {"tiny": scratch / "tiny", "sdxl": ROOT / "weights" / "random-sdxl"}
    if model in made and not made[model].is_dir():
        write_random_model(made[model], size=model, dtype=torch.float16)
    return made.get(model, Path(model))


def draw_requests(card: ModelCard, batch: int, size: int | None, seeds: Iterator[int]) -> Requests:
    """One request per image of a batch, each with the next seed and a prompt of its own."""
    resolve = partial(GenerationRequest.resolve, card, width=size, height=size)
    return [resolve(prompt=f"lighthouse {s} in a storm", seed=s) for s in islice(seeds, batch)]


def measure(contenders: list[Contender], first: Requests, others: list[Requests]) -> list[Row]:
    """Warm the contenders up with the first batch, and let them take turns at the others."""
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    without_memory: dict[str, str] = {}

    def attempt(contender: Contender, work: Callable[[], Run | None]) -> None:
        if contender.name in without_memory:
            return
        try:
            if (run := work()) is not None:
                runs[contender.name].append(run)
        except (DeviceMemoryError, torch.OutOfMemoryError) as error:
            without_memory[contender.name] = f"out of memory: {error}".partition("\n")[0]

    for contender in contenders:
        attempt(contender, partial(contender.warm_up, first))
    for requests in others:
        for contender in contenders:
            attempt(contender, partial(contender.run, requests))
    whole = {name: each for name, each in runs.items() if name not in without_memory}
    stock = whole.get("diffusers")
    return [
        {
            "batch": len(first),
            "peer": contender.name,
            "error": without_memory.get(contender.name),
            **figures(contender, whole.get(contender.name), stock),
        }
        for contender in contenders
    ]


def figures(contender: Contender, runs: list[Run] | None, stock: list[Run] | None) -> Row:
    """Medians, and the same batches by diffusers beside them where both had the memory."""
    total = total_s(runs) if runs else None
    peak = max(run.peak_bytes for run in runs) if runs else 0
    stages = np.median([np.diff(run.times) for run in runs], axis=0) if runs else STAGES
    both = (runs, stock) if runs and stock else None
    return {
        **{
            f"{stage}_ms": round(1000 * float(seconds), 2) if runs else None
            for stage, seconds in zip(STAGES, stages, strict=True)
        },
        "total_ms": round(1000 * total, 2) if total else None,
        "time_over_diffusers": round(total_s(both[0]) / total_s(both[1]), 3) if both else None,
        "images_per_s": round(len(runs[0].files) / total, 3) if runs and total else None,
        "max_pixel_difference": largest_difference(*both) if both else None,
        "peak_gpu_gb": round(peak / 1e9, 2) if peak else None,
        "load_s": round(contender.load_s, 2),
        "warm_up_s": round(contender.warm_up_s, 2),
    }


def total_s(runs: list[Run]) -> float:
    """Median seconds from prompts to PNG files."""
    return float(np.median([run.times[-1] - run.times[0] for run in runs]))


def largest_difference(runs: list[Run], stock: list[Run]) -> int:
    """Of any pixel of the same batches."""
    return int(np.abs(pixels_of(runs) - pixels_of(stock)).max())


def pixels_of(runs: list[Run]) -> NDArray[np.int16]:
    """All images [N, H, W, 3], signed so that they can be subtracted."""
    files = [file for run in runs for file in run.files]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)), np.int16) for file in files])


def print_table(rows: list[Row]) -> None:
    """The rows in Markdown; "-" is what does not apply."""
    for cells in (rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)):
        print(f"| {' | '.join('-' if cell is None else str(cell) for cell in cells)} |")


if __name__ == "__main__":
    main()
