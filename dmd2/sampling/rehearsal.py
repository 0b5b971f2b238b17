"""An image that nobody sees, made plainly at setup: what the ways are measured and judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from dmd2.fast.budget import Budget
from dmd2.fast.tuning import Bench, Tuning, tune
from dmd2.fast.ways import WAYS, Facts, Part, Way
from dmd2.models import device_work, vae
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.sample import Sample

Call = Callable[[Any], torch.Tensor]


def choose_ways(
    pipeline: Pipeline,
    request: GenerationRequest,
    tuning: Tuning,
    budget: Budget,
    ways: Sequence[Way] = WAYS,
) -> dict[Part, float]:
    """Give a pipeline's runners the ways that are worth it here, for good.

    They are tried on the request's first image: a step at its first timestep, at its last, and at
    both for two images at once, and a decode. The plain models' first calls for one image, which
    setup owes the first request anyway, are not charged to the budget.

    Returns:
        Seconds of a call for one image by what was chosen, for the parts that were measured.

    Raises:
        DeviceMemoryError: the plain models have not enough memory for one image.
        DMD2Error: a way has broken the device.
    """
    if tuning.mode == "off" and not tuning.compile:
        return {}
    rehearsed: dict[Part, _Calls] = {"step": _Calls(), "decode": _Calls()}
    if tuning.measures:
        rehearsed = _rehearsed(pipeline, request, budget)
    chosen_s: dict[Part, float] = {}
    # The decode first: on most devices it has more to gain, and its trial takes fewer calls.
    for runner in (pipeline.vae, pipeline.unet):
        calls = rehearsed[runner.part]
        dtype = runner.plain.dtype
        facts = Facts(pipeline.device, dtype, tuning.compile, pipeline.low_memory)
        bench = Bench(runner, facts, calls.single, min(calls.plain_s, default=0.0), calls.pair)
        if (seconds := tune(bench, tuning, budget, ways)) > 0:
            chosen_s[runner.part] = seconds
    return chosen_s


@dataclass
class _Calls:
    """Of a part, in the image that was made plainly.

    Attributes:
        single: for that image alone.
        pair: for two.
        plain_s: what calls for one took. The least says most: whatever else the host does, and
            what comes first, adds to it.
    """

    single: list[Call] = field(default_factory=list)
    pair: Call | None = None
    plain_s: list[float] = field(default_factory=list)


@device_work.memory_errors
@torch.inference_mode()
def _rehearsed(
    pipeline: Pipeline, request: GenerationRequest, budget: Budget
) -> dict[Part, _Calls]:
    """The calls that make an image, plainly made once."""
    (conditioning,) = pipeline.encode([request])
    # One step to the last timestep, and not three: near enough to what the UNet sees there.
    ends = tuple(dict.fromkeys((request.timesteps[0], request.timesteps[-1])))
    sample = pipeline.start(request, 0, conditioning).from_start(ends)
    step, decode = _steps(pipeline, sample, budget), _Calls()
    latents = sample.trajectory.latents[None]

    def call(decoder: Any) -> torch.Tensor:
        return vae.decode_to_float(decoder, latents)

    decode.single.append(call)
    with budget.uncharged():
        decode.plain_s.append(_seconds(pipeline, lambda: pipeline.vae(call), budget))
    if pipeline.warms_up:  # a first call says nothing of the later ones
        decode.plain_s.append(_seconds(pipeline, lambda: pipeline.vae(call), budget))
        if len(step.plain_s) == 1:
            first = step.single[0]
            step.plain_s.append(_seconds(pipeline, lambda: pipeline.unet(first), budget))
    return {"step": step, "decode": decode}


def _steps(pipeline: Pipeline, sample: Sample, budget: Budget) -> _Calls:
    """Take an image's steps; without time for those after the first its latents are left noisy."""
    first, steps = sample.from_start(), _Calls()
    while not sample.trajectory.done:
        steps.single.append(pipeline.unet_call([sample]))
        # Two images that differ, in their timesteps too where there are two: none may get
        # another's.
        steps.pair = pipeline.unet_call([first, sample])
        is_first = not steps.plain_s
        if is_first or pipeline.warms_up or steps.plain_s[0] < budget.left():
            with budget.uncharged() if is_first else nullcontext():
                steps.plain_s.append(_seconds(pipeline, lambda: pipeline.step([sample]), budget))
        else:
            sample.trajectory.advance(sample.trajectory.latents)
    return steps


def _seconds(pipeline: Pipeline, run: Callable[[], object], budget: Budget) -> float:
    """Until the device has done what run gives it."""
    pipeline.mark()()
    began = budget.now()
    run()
    pipeline.mark()()
    return budget.now() - began
