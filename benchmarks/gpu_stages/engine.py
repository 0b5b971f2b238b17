"""The engine without HTTP: clients that ask again at once, from prompt to PNG files."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from dmd2.engine.engine import Engine
from dmd2.engine.opening import open_engine
from dmd2.request.generation_request import GenerationRequest
from dmd2.settings import Settings
from gpu_stages import model
from gpu_stages.scene import Scene
from gpu_stages.timing import Row, fresh_memory, measured, peak_reserved_gb

_FIGURES = (
    "images",
    "images_per_s",
    "p50_ms",
    "p95_ms",
    "images_a_step",
    "peak_reserved_gb",
)


def run(scene: Scene, **settings: str) -> dict[str, Any]:
    """A row for each number of clients, on an engine with these DMD2_ settings beside default."""
    folder = model.settled(scene)
    fresh_memory()
    with tempfile.TemporaryDirectory(dir=scene.scratch) as outputs:
        variables = {"DMD2_MODEL": str(folder), "DMD2_DEVICE": scene.device, **settings}
        variables |= {"DMD2_OUTPUT_DIR": outputs, "DMD2_SAFETY": "off"}
        variables |= scene.pick({}, {"DMD2_MAX_BATCH": "2"})
        started = time.perf_counter()
        engine = open_engine(Settings.from_environment(variables))
        open_s = time.perf_counter() - started
        try:
            numbers = count()
            request = GenerationRequest.resolve(engine.card, prompt="a red circle", seed=7)
            ways = engine.submit(request).result().ways
            rows = [row(scene, engine, clients, numbers) for clients in (1, 4, 16)]
        finally:
            engine.close()
    return {
        "headline": ", ".join(f"{r['clients']} clients {r['images_per_s']}/s" for r in rows),
        "settings": dict(settings),
        "open_s": round(open_s, 2),
        "limits": str(engine._limits),
        "ways": ways,
        "rows": rows,
    }


def row(scene: Scene, engine: Engine, clients: int, numbers: Iterator[int]) -> Row:
    """Of so many clients."""
    loop = partial(closed_loop, scene, engine, clients, numbers)
    return measured({"clients": clients}, _FIGURES, loop)


def closed_loop(scene: Scene, engine: Engine, clients: int, numbers: Iterator[int]) -> Row:
    """So many clients, each with a new prompt as soon as it has its file's bytes."""
    seconds, ramp_s = scene.pick(4.0, 0.2), scene.pick(1.0, 0.05)
    fresh_memory()
    begin = time.perf_counter() + ramp_s
    end = begin + seconds
    latencies: list[tuple[float, float]] = []  # when it was answered, and after how long
    batches: list[int] = []

    async def client() -> None:
        while (asked := time.perf_counter()) < end:
            number = next(numbers)
            request = GenerationRequest.resolve(
                engine.card, prompt=f"{number} lighthouses", seed=number
            )
            result = await engine.generate(request)
            await asyncio.to_thread(take, result.paths)
            latencies.append((time.perf_counter(), time.perf_counter() - asked))
            batches.extend(result.batch_sizes)

    async def all_clients() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    asyncio.run(all_clients())
    took = [took for answered, took in latencies if begin <= answered < end]
    if not took:  # an image takes longer than the whole measurement: those that there were must do
        took = [took for _, took in latencies]
        seconds = time.perf_counter() - begin + ramp_s
    return {
        "images": len(took),
        "images_per_s": round(len(took) / seconds, 3),
        "p50_ms": round(1000 * float(np.percentile(took, 50)), 2),
        "p95_ms": round(1000 * float(np.percentile(took, 95)), 2),
        "images_a_step": round(float(np.mean(batches)), 2),
        "peak_reserved_gb": peak_reserved_gb(),
    }


def take(paths: list[Path]) -> None:
    """Read a client's files, and make room for others."""
    for path in paths:
        path.read_bytes()
        path.unlink()
