"""The plain way, which every other one is measured beside: times and memory."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from full_size import weights_gb

from dmd2.sampling.pipeline import Pipeline
from gpu_stages import model
from gpu_stages.scene import Scene
from gpu_stages.timing import Row, fresh_memory, measured, median_ms, peak_reserved_gb
from gpu_stages.work import Work

_FIGURES = (
    "encode_ms",
    "step_ms",
    "decode_ms",
    "image_ms",
    "peak_reserved_gb",
    "first_calls_s",
)


def run(scene: Scene) -> dict[str, Any]:
    """A row for each batch size."""
    folder = model.settled(scene)
    started = time.perf_counter()
    pipeline = Pipeline.load(folder, scene.device)
    load_s = time.perf_counter() - started
    work = Work(pipeline)
    rows = [row(scene, work, batch) for batch in scene.pick((1, 2, 4, 8), (1, 2))]
    finished = work.latents(1)
    first = rows[0]
    return {
        "headline": ", ".join(f"{name} {first[name]}" for name in _FIGURES[:5]),
        "dtype": str(pipeline.dtype),
        "size": list(pipeline.card.default_size),
        "load_s": round(load_s, 2),
        "weights_gb": round(weights_gb(pipeline), 3),
        "rows": rows,
        "is_finite": bool(all(s.trajectory.latents.isfinite().all() for s in finished)),
    }


def row(scene: Scene, work: Work, batch: int) -> Row:
    """Of one batch size; the memory is of all stages together, weights included."""
    pipeline, device = work.pipeline, work.pipeline.device

    def measure() -> Row:
        fresh_memory()
        started = time.perf_counter()
        work.images(work.requests(batch))
        first_calls_s = time.perf_counter() - started
        seconds = scene.pick(1.0, 0.02)
        noise, requests = partial(work.noise, batch), partial(work.requests, batch)
        latents = work.latents(batch)
        times = {
            "encode_ms": median_ms(device, requests, pipeline.encode, seconds=seconds),
            "step_ms": median_ms(device, noise, pipeline.step, seconds=seconds),
            "decode_ms": median_ms(device, lambda: latents, pipeline.decode, seconds=seconds),
            "image_ms": median_ms(device, requests, work.images, seconds=seconds),
        }
        return times | {
            "peak_reserved_gb": peak_reserved_gb(),
            "first_calls_s": round(first_calls_s, 2),
        }

    return measured({"batch": batch}, _FIGURES, measure)
