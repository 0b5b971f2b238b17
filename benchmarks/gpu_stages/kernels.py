"""What a step and a decode of one image are made of, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Tuning
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways
from gpu_stages import model
from gpu_stages.scene import Scene
from gpu_stages.timing import Row
from gpu_stages.work import Work

_TOP = 15


def run(scene: Scene) -> dict[str, Any]:
    """The plain models' kernels, and those of all exact ways that can be built."""
    pipeline = Pipeline.load(model.settled(scene), scene.device)
    work = Work(pipeline)
    plain = kernels_of(work)
    (request,) = work.requests(1)
    choose_ways(pipeline, request, Tuning("force"), Budget())
    fast = kernels_of(work)
    tops = [f"{part} {rows[0]['kernel'][:40]} {rows[0]['share']}" for part, rows in fast.items()]
    return {"headline": ", ".join(tops), "plain": plain, "fast": fast}


def kernels_of(work: Work) -> dict[str, list[Row]]:
    """Of a step and of a decode, after one of each to warm up."""
    pipeline = work.pipeline
    work.images(work.requests(1))
    samples, finished = work.noise(1), work.latents(1)
    return {
        "step": kernels(pipeline.device, lambda: pipeline.step(samples)),
        "decode": kernels(pipeline.device, lambda: pipeline.decode(finished)),
    }


def kernels(device: torch.device, run: Callable[[], object]) -> list[Row]:
    """The kernels (on a CPU, operations) that take the most of the device's time in one run."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiled:
        run()
        if is_cuda:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if is_cuda else DeviceType.CPU
    time_of = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    found = [event for event in profiled.key_averages() if event.device_type == kind]
    found.sort(key=lambda event: -float(getattr(event, time_of)))
    total = sum(float(getattr(event, time_of)) for event in found)
    return [
        {
            "kernel": event.key[:160],
            "calls": event.count,
            "ms": round(float(getattr(event, time_of)) / 1000, 3),
            "share": round(float(getattr(event, time_of)) / total, 4),
        }
        for event in found[:_TOP]
    ]
