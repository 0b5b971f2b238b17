"""An image that nobody sees, made plainly at setup: what the ways are measured and judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    They are tried on the request's first image: a step at its first and at its last timestep, and
    a decode. The plain models' first calls, which setup owes the first request anyway, are not
    charged to the budget.

    Returns:
        Seconds of a call for one image by what was chosen, for the parts that were measured.

    Raises:
        DeviceMemoryError: the plain models have not enough memory for one image.
        DMD2Error: a way has broken the device.
    """
    if tuning.mode == "off" and not tuning.compile:
        return {}
    calls: dict[Part, list[Call]] = {"step": [], "decode": []}
    plain_s: dict[Part, float] = {"step": 0.0, "decode": 0.0}
    if tuning.measures:
        calls = _rehearsed(pipeline, request, plain_s, budget)
    chosen_s: dict[Part, float] = {}
    # The decode first: on most devices it has more to gain, and its trial takes fewer calls.
    for runner in (pipeline.vae, pipeline.unet):
        part = runner.part
        dtype = runner.plain.dtype
        facts = Facts(pipeline.device, dtype, tuning.compile, pipeline.low_memory)
        seconds = tune(Bench(runner, facts, calls[part], plain_s[part]), tuning, budget, ways)
        if seconds > 0:
            chosen_s[part] = seconds
    return chosen_s


@device_work.memory_errors
@torch.inference_mode()
def _rehearsed(
    pipeline: Pipeline, request: GenerationRequest, plain_s: dict[Part, float], budget: Budget
) -> dict[Part, list[Call]]:
    """The calls that make an image, plainly made once; plain_s gets what each takes, about."""
    (conditioning,) = pipeline.encode([request])
    # One step to the last timestep, and not three: near enough to what the UNet sees there.
    ends = tuple(dict.fromkeys((request.timesteps[0], request.timesteps[-1])))
    sample = pipeline.start(request, 0, conditioning).from_start(ends)
    first = pipeline.unet_call([sample])
    with budget.uncharged():
        plain_s["step"] = _seconds(pipeline, lambda: pipeline.step([sample]), budget)
    last = _last_steps(pipeline, sample, plain_s["step"] < budget.left())
    latents = sample.trajectory.latents[None]

    def decode(decoder: Any) -> torch.Tensor:
        return vae.decode_to_float(decoder, latents)

    with budget.uncharged():
        plain_s["decode"] = _seconds(pipeline, lambda: pipeline.vae(decode), budget)
    if pipeline.warms_up:  # a first call says nothing of the later ones
        plain_s["step"] = _seconds(pipeline, lambda: pipeline.unet(first), budget)
        plain_s["decode"] = _seconds(pipeline, lambda: pipeline.vae(decode), budget)
    return {"step": [first, *last], "decode": [decode]}


def _last_steps(pipeline: Pipeline, sample: Sample, there_is_time: bool) -> list[Call]:
    """The calls of all steps after the first; without time the last latents are left noisy."""
    calls = []
    while not sample.trajectory.done:
        calls.append(pipeline.unet_call([sample]))
        if there_is_time or pipeline.warms_up:
            pipeline.step([sample])
        else:
            sample.trajectory.advance(sample.trajectory.latents)
    return calls


def _seconds(pipeline: Pipeline, run: Callable[[], object], budget: Budget) -> float:
    """Until the device has done what run gives it."""
    pipeline.mark()()
    began = budget.now()
    run()
    pipeline.mark()()
    return budget.now() - began
