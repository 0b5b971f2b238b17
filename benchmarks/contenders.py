"""The contenders of peers.py: each loads a copy of the model, and makes batches of PNG files."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from dmd2.engine import image_io
from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning
from dmd2.models.loading import choose_dtype
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways

PEERS = (
    "ours",
    "ours-plain",
    "ours-compile",
    "diffusers",
    "diffusers-compile",
    "attention-slicing",
)
TUNING = {
    "ours": Tuning("quick"),
    "ours-plain": Tuning("off"),
    "ours-compile": Tuning("off", compile=True),
}
STAGES = ("encode", "sample", "decode", "png")

Requests = list[GenerationRequest]
Generate = Callable[[Requests], tuple[list[bytes], list[float]]]


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
        is_recorded = self.name.endswith("-compile") and torch.cuda.is_available()
        for _ in range(3 if is_recorded else 1):
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
        request = GenerationRequest.resolve(pipeline.card, prompt="warm up", seed=0)
        choose_ways(pipeline, request, TUNING[name], Budget())
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
