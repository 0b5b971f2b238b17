"""Encode an image in each format and setting: milliseconds, bytes, and what it does to threads.

    scripts/lib/python benchmarks/encode.py [--size 1024] [--repeats 9] [--threads 4]

"ours" is what image_io writes; fpng is measured where it is installed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from dmd2 import __version__
from dmd2.engine import image_io
from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest

Pixels = NDArray[np.uint8]
Encoder = Callable[[Pixels], bytes]
CARD = ModelCard("benchmark", {4: (999, 749, 499, 249)}, (1024, 1024))


def main() -> None:
    """Measure every encoder on every image, alone and in threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="side of the square, in pixels")
    parser.add_argument("--repeats", type=int, default=9, help="measured runs; the median counts")
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    rows = []
    for image, pixels in images(options.size).items():
        for name, encoder in encoders().items():
            row = {"image": image, "encoder": name, **measure(encoder, pixels, options.repeats)}
            if image == "photo":
                row |= measure_threads(encoder, pixels, options.threads, options.repeats)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
    report = {"benchmark": "encode", **machine(), **vars(options), "rows": rows}
    print(json.dumps(report))


def images(size: int) -> dict[str, Pixels]:
    """Uint8 [size, size, 3]: one like a photo, one like a drawing, and pure noise."""
    drawing = np.full((size, size, 3), 240, np.uint8)
    drawing[size // 5 : size // 2, size // 10 : size * 2 // 3] = (20, 90, 200)
    drawing[size * 3 // 5 :, size // 3 : size // 2] = 0
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return {"photo": photo_like(size), "drawing": drawing, "noise": noise}


def photo_like(size: int) -> Pixels:
    """Octaves of smoothed noise, each half as strong as the one before: a photo's spectrum."""
    rng = np.random.default_rng(0)
    total = np.zeros((size, size, 3), np.float32)
    for octave in range(2, size.bit_length()):
        for channel in range(3):
            grid = Image.fromarray(rng.standard_normal((2**octave,) * 2).astype(np.float32))
            smooth = grid.resize((size, size), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(smooth) / 2**octave
    total -= total.min()
    return (total * (255 / total.max())).astype(np.uint8)


def encoders() -> dict[str, Encoder]:
    """What image_io does, and what else one could do."""
    named = {
        "png ours": ours("png"),
        "png pillow level 1": pillow("PNG", compress_level=1),
        "png pillow level 6": pillow("PNG", compress_level=6),
        "jpg ours": ours("jpg"),
        "jpg optimized": pillow("JPEG", quality=90, optimize=True),
        "jpg 4:4:4": pillow("JPEG", quality=90, subsampling="4:4:4"),
        "webp ours": ours("webp"),
        "webp method 2": pillow("WEBP", quality=90, method=2),
        "webp method 4": pillow("WEBP", quality=90, method=4),
    }
    if importlib.util.find_spec("fpng"):
        import fpng

        named["png fpng"] = fpng.from_ndarray
    return named


def ours(output_format: str) -> Encoder:
    """The encoder of image_io, at the default quality and with metadata."""
    request = GenerationRequest.resolve(
        CARD, prompt="a lighthouse in a storm", output_format=output_format
    )
    return lambda pixels: image_io.encode(pixels, request, 0)


def pillow(pillow_format: str, **options: Any) -> Encoder:
    """One of Pillow's encoders."""

    def encoder(pixels: Pixels) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, pillow_format, **options)
        return buffer.getvalue()

    return encoder


def measure(encoder: Encoder, pixels: Pixels, repeats: int) -> dict[str, float]:
    """Median wall and CPU ms of one call alone, kB, and the PSNR in dB (none where lossless)."""
    data = encoder(pixels)
    wall, cpu = [], []
    for _ in range(repeats):
        started, started_cpu = time.perf_counter(), time.thread_time()
        encoder(pixels)
        wall.append(time.perf_counter() - started)
        cpu.append(time.thread_time() - started_cpu)
    decoded = np.asarray(Image.open(io.BytesIO(data)), np.float64)
    error = float(np.mean((decoded - pixels) ** 2))
    result = {
        "ms": round(statistics.median(wall) * 1e3, 2),
        "cpu_ms": round(statistics.median(cpu) * 1e3, 2),
        "kb": round(len(data) / 1e3, 1),
    }
    return result | ({"psnr_db": round(10 * math.log10(255**2 / error), 2)} if error else {})


def measure_threads(
    encoder: Encoder, pixels: Pixels, num_threads: int, repeats: int
) -> dict[str, float]:
    """Ms an image with num_threads at work, and how fast another Python thread still is.

    That other thread asks for Python's lock over and over, as one that launches kernels does;
    1 is its speed with no encoder beside it. An encoder that keeps the lock stops it.
    """
    seconds = []
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(encoder, [pixels] * 2 * num_threads))
            seconds.append((time.perf_counter() - started) / (2 * num_threads))
    alone = lock_rate(lambda: time.sleep(0.01))
    beside = lock_rate(lambda: encoder(pixels))
    return {
        "threads_ms": round(statistics.median(seconds) * 1e3, 2),
        "other_thread": round(beside / alone, 2),
    }


def lock_rate(work: Callable[[], object], seconds: float = 1.0) -> float:
    """How often a second this thread gets Python's lock while one other repeats work."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            work()

    other = threading.Thread(target=repeat)
    other.start()
    num_turns, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        time.sleep(0)
        num_turns += 1
    stop.set()
    other.join()
    return num_turns / seconds


def machine() -> dict[str, Any]:
    """The CPU, how busy it is, and the versions of all that encodes, what is in Pillow too."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = [name for name in ("isal", "fpng") if importlib.util.find_spec(name)]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {
            "dmd2": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "pillow", *packages)},
            **{name: features.version(name) for name in ("zlib_ng", "libjpeg_turbo", "webp")},
        },
    }


if __name__ == "__main__":
    main()
