"""Load and run SDXL at full size with random weights: seconds per stage, and memory.

    scripts/lib/python benchmarks/full_size.py [--dtype float16] [--size 1024] [--images 5]

The model folder (7 GB) is made on first use in weights/random-sdxl and kept. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from random_model import write_random_model

from dmd2 import __version__
from dmd2.engine.engine import Engine
from dmd2.engine.job import STAGES
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.settings import ROOT


def main() -> None:
    """Load once, make one image to warm up, then measure the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--size", type=int, default=1024, help="side of the square, in pixels")
    parser.add_argument("--images", type=int, default=5, help="measured images; 0 only loads")
    options = parser.parse_args()
    folder = ROOT / "weights" / "random-sdxl"
    if not folder.is_dir():
        write_random_model(folder, size="sdxl", dtype=torch.float16)
    before = peak_rss_gb()
    started = time.perf_counter()
    pipeline = Pipeline.load(folder, dtype=options.dtype)
    report = {
        "benchmark": "full_size",
        "device": device_name(pipeline.device),
        "dtype": str(pipeline.dtype),
        "size": options.size,
        "versions": {
            "dmd2": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "load_s": round(time.perf_counter() - started, 2),
        "weights_gb": round(weights_gb(pipeline), 2),
        "host_gb_before": round(before, 2),
        "host_peak_gb_after_load": round(peak_rss_gb(), 2),
        "stages_median_s": stage_seconds(pipeline, options.size, options.images),
        "host_peak_gb": round(peak_rss_gb(), 2),
    }
    if pipeline.device.type == "cuda":
        report["gpu_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    print(json.dumps(report))


def stage_seconds(pipeline: Pipeline, size: int, num_images: int) -> dict[str, float]:
    """Median seconds per stage over num_images single-image requests, after one to warm up."""
    if num_images == 0:
        return {}
    seconds = []
    with tempfile.TemporaryDirectory() as outputs:
        engine = Engine(pipeline, Path(outputs))
        for seed in range(num_images + 1):
            request = GenerationRequest.resolve(
                pipeline.card, prompt="a lighthouse in a storm", seed=seed, width=size, height=size
            )
            seconds.append(engine.submit(request).result().seconds)
        engine.close()
    return {s: round(statistics.median(t[s] for t in seconds[1:]), 4) for s in STAGES}


def weights_gb(pipeline: Pipeline) -> float:
    """Bytes of all parameters, in GB."""
    models = [pipeline.unet.plain, pipeline.vae.plain, *pipeline._text_encoder._encoders]
    return sum(p.numel() * p.element_size() for m in models for p in m.parameters()) / 1e9


def peak_rss_gb() -> float:
    """The most memory that this process has had, in GB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def device_name(device: torch.device) -> str:
    """The device as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


if __name__ == "__main__":
    main()
