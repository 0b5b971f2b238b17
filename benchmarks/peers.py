"""One image from prompt to PNG bytes, per stage and per batch: dmd2 against stock diffusers.

    scripts/lib/python benchmarks/peers.py [--model sdxl] [--peers ours,diffusers] [--batches 1,2]

The contenders share one process, one model folder and one dtype (float16 on CUDA, else float32):

  ours               dmd2's Pipeline, then image_io
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from full_size import device_name
from numpy.typing import NDArray
from PIL import Image
from random_model import write_random_model

import dmd2
from dmd2.engine import image_io
from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning
from dmd2.model_card import ModelCard
from dmd2.models.loading import choose_device, choose_dtype
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways
from dmd2.settings import ROOT

PEERS = ("ours", "ours-compile", "diffusers", "diffusers-compile", "attention-slicing")
STAGES = ("encode", "sample", "decode", "png")

Row = dict[str, Any]
Requests = list[GenerationRequest]
Generate = Callable[[Requests], tuple[list[bytes], list[float]]]


def main() -> None:
    """Load all contenders, measure them batch size by batch size; print the table and the JSON."""
    device = choose_device("auto")
    options = parse_options(device)
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


def parse_options(device: torch.device) -> argparse.Namespace:
    """The command line; what it leaves out depends on the device."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    model, batches = ("sdxl", "1,2,4,8") if device.type == "cuda" else ("tiny", "1")
    add = parser.add_argument
    add("--model", default=model, metavar="tiny|sdxl|FOLDER", help=f"by default {model} here")
    add("--peers", default=",".join(PEERS), help="by default all")
    add("--batches", default=batches, help=f"images at once; by default {batches} here")
    add("--size", type=int, help="side of the square, in pixels; by default the model's own")
    add("--repeats", type=int, default=5, help="measured batches, of which medians are taken")
    options = parser.parse_args()
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


def now() -> float:
    """The time in seconds when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def generate_ours(pipeline: Pipeline, requests: Requests) -> tuple[list[bytes], list[float]]:
    """A batch's PNG files, and the times before, between and after the STAGES."""
    times = [now()]
    started = zip(requests, pipeline.encode(requests), strict=True)
    times.append(now())
    samples = [pipeline.start(request, 0, conditioning) for request, conditioning in started]
    while not samples[0].trajectory.done:
        pipeline.step(samples)
    times.append(now())
    pixels = [picture.pixels() for picture in pipeline.decode(samples)]
    times.append(now())
    files = [image_io.encode(p, r, 0) for p, r in zip(pixels, requests, strict=True)]
    return files, [*times, now()]


@torch.no_grad()
def generate_stock(pipe: Any, requests: Requests) -> tuple[list[bytes], list[float]]:
    """As generate_ours: what a call of the pipeline does, with a stop after each stage."""
    times = [now()]
    prompt_embeds, _, pooled_prompt_embeds, _ = pipe.encode_prompt(
        [request.prompt for request in requests], do_classifier_free_guidance=False
    )
    times.append(now())
    latents = pipe(
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=pooled_prompt_embeds,
        width=requests[0].width,
        height=requests[0].height,
        timesteps=list(requests[0].timesteps),
        guidance_scale=0.0,
        generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
        output_type="latent",
    ).images
    times.append(now())
    scaled = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
    decoded = pipe.vae.decode(scaled, return_dict=False)[0]
    pictures = pipe.image_processor.postprocess(decoded, output_type="pil")
    times.append(now())
    files = [io.BytesIO() for _ in pictures]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file, "PNG")
    return [file.getvalue() for file in files], [*times, now()]


def load(name: str, folder: Path, device: torch.device) -> Generate:
    """Load a contender's own copy of the model, set up as its name says."""
    if name.startswith("ours"):
        pipeline = Pipeline.load(folder, device.type)
        if name == "ours-compile":
            request = GenerationRequest.resolve(pipeline.card, prompt="warm up", seed=0)
            choose_ways(pipeline, request, Tuning("off", compile=True), Budget())
        return partial(generate_ours, pipeline)
    dtype = choose_dtype("auto", device)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if name == "diffusers-compile":
        compile_models(pipe, mode="max-autotune" if device.type == "cuda" else "default")
    elif name == "attention-slicing":
        slice_models(pipe)
    return partial(generate_stock, pipe)


def compile_models(pipe: Any, *, mode: str) -> None:
    """What diffusers' documentation advises under "Accelerate inference"."""
    # By default a second batch size would bring dynamic shapes; a graph for each is faster.
    compiled = partial(torch.compile, mode=mode, fullgraph=True, dynamic=False)
    pipe.unet = compiled(pipe.unet.to(memory_format=torch.channels_last))
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.vae.decode = compiled(pipe.vae.decode)


def slice_models(pipe: Any) -> None:
    """What a well-known DMD2 container switched on."""
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    # As SDXL's own VAE has it; a random model's config does not say and would mean 32 and 4.
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 1024, 128
    pipe.vae.to(torch.float32)
    # Slicing and fusing each replace the attention processors, so the last one wins. Fusing comes
    # last: slicing is then without effect. diffusers warns that with torch's attention it is slow.
    pipe.fuse_qkv_projections()


@dataclass(frozen=True)
class Run:
    """One batch by one contender: PNG files, times around STAGES, and bytes of GPU memory."""

    files: list[bytes]
    times: list[float]
    peak_bytes: int


class Contender:
    """One of PEERS, loaded; it knows how many seconds that and its last warm-up took."""

    def __init__(self, name: str, folder: Path, device: torch.device) -> None:
        self.name = name
        before, started = kept_bytes(), now()
        self._generate = load(name, folder, device)
        self.load_s, self.warm_up_s = now() - started, 0.0
        self._kept_bytes = kept_bytes() - before

    def warm_up(self, requests: Requests) -> None:
        """Make the first calls at a batch size."""
        before, started = kept_bytes(), now()
        # Inductor records its CUDA graphs at the second call and replays them from the third.
        for _ in range(3 if torch.cuda.is_available() else 1):
            self._generate(requests)
        self.warm_up_s = now() - started
        self._kept_bytes += kept_bytes() - before

    def run(self, requests: Requests) -> Run:
        """A measured batch; its memory is what the contender keeps and what the batch adds."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        files, times = self._generate(requests)
        return Run(files, times, self._kept_bytes + torch.cuda.max_memory_allocated() - before)


def kept_bytes() -> int:
    """GPU memory kept between batches: weights, and CUDA graphs, which torch only reserves."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def measure(contenders: list[Contender], first: Requests, others: list[Requests]) -> list[Row]:
    """Warm the contenders up with the first batch, and let them take turns at the others."""
    for contender in contenders:
        contender.warm_up(first)
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for requests in others:
        for contender in contenders:
            runs[contender.name].append(contender.run(requests))
    stock = runs.get("diffusers")
    return [row_of(contender, runs[contender.name], stock) for contender in contenders]


def row_of(contender: Contender, runs: list[Run], stock: list[Run] | None) -> Row:
    """Medians, and the same batches by diffusers beside them where it takes part."""
    batch, total, peak = len(runs[0].files), total_s(runs), max(run.peak_bytes for run in runs)
    difference = int(np.abs(pixels_of(runs) - pixels_of(stock)).max()) if stock else None
    stages = zip(STAGES, np.median([np.diff(run.times) for run in runs], axis=0), strict=True)
    return {
        "batch": batch,
        "peer": contender.name,
        **{f"{stage}_ms": round(1000 * float(seconds), 2) for stage, seconds in stages},
        "total_ms": round(1000 * total, 2),
        "time_over_diffusers": round(total / total_s(stock), 3) if stock else None,
        "images_per_s": round(batch / total, 3),
        "max_pixel_difference": difference,
        "peak_gpu_gb": round(peak / 1e9, 2) if peak else None,
        "load_s": round(contender.load_s, 2),
        "warm_up_s": round(contender.warm_up_s, 2),
    }


def total_s(runs: list[Run]) -> float:
    """Median seconds from prompts to PNG files."""
    return float(np.median([run.times[-1] - run.times[0] for run in runs]))


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
