"""Each faster way, one by one: what it costs, what it brings, and how far off it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dmd2.fast.budget import Budget
from dmd2.fast.judge import _pixel_differences, _relative_error, judge, limits_for
from dmd2.fast.runner import in_a_line
from dmd2.fast.tuning import Tuning
from dmd2.fast.ways import PLAIN, WAYS, Facts, Part, Way
from dmd2.models import vae
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways
from gpu_stages import model
from gpu_stages.in_float32 import InFloat32
from gpu_stages.scene import Scene
from gpu_stages.timing import Row, fresh_memory, measured, median_ms, peak_reserved_gb
from gpu_stages.work import Work

Call = Callable[[Any], torch.Tensor]

_RGB = 3
_FIGURES = (
    "build_s",
    "first_call_s",
    "ms",
    "of_plain",
    "to_plain",
    "to_float32",
    "pixels_mean",
    "pixels_most",
    "verdict",
    "peak_reserved_gb",
)


@dataclass(frozen=True)
class Trial:
    """What the ways of a part are asked at one batch size.

    Attributes:
        calls: for "step" one at the first timestep and one at the last, for "decode" one.
        plain: what the plain model returns for each.
        exact: what its float32 copy does, without TF32; empty where there was no memory for it.
        plain_ms: of the first call.
        plain_gb: the most memory that was held for it, weights included.
    """

    batch: int
    calls: Sequence[Call]
    plain: Sequence[torch.Tensor]
    exact: Sequence[torch.Tensor]
    plain_ms: float
    plain_gb: float


def run(scene: Scene) -> dict[str, Any]:
    """The choice that setup would make here, and a row for each part, batch size and way."""
    pipeline = Pipeline.load(model.settled(scene), scene.device)
    work = Work(pipeline)
    work.images(work.requests(1))
    started = time.perf_counter()
    (request,) = work.requests(1)
    choose_ways(pipeline, request, Tuning("quick"), Budget())
    tuning_s = time.perf_counter() - started
    chosen = {runner.part: runner.way for runner in (pipeline.unet, pipeline.vae)}
    # Or what they keep would count in every row's memory, and their rounding in every input.
    for runner in (pipeline.unet, pipeline.vae):
        runner.drop("is measured by itself from here on")
    rows: list[Row] = []
    with torch.inference_mode():
        for part in ("step", "decode"):
            rows += rows_of_part(scene, work, part)
    ones = [row for row in rows if row["batch"] == 1]
    said = [f"{row['part']} {row['way']} {row['ms']} ms {row['verdict']}" for row in ones]
    return {
        "headline": ", ".join(said),
        "tuning_s": round(tuning_s, 2),
        "chosen": chosen,
        "rows": rows,
    }


def rows_of_part(scene: Scene, work: Work, part: Part) -> list[Row]:
    """Plain's row at each batch size, then those of each way."""
    runner = work.pipeline.unet if part == "step" else work.pipeline.vae
    plain, seconds = runner.plain, scene.pick(1.0, 0.02)
    facts = Facts(work.pipeline.device, plain.dtype)
    trials, rows = [], []
    for batch in scene.pick((1, 4, 8), (1, 2)):

        def measure(batch: int = batch) -> Row:
            trial = trial_of(work, part, batch, seconds)
            trials.append(trial)
            return plain_figures(trial)

        rows.append(measured({"part": part, "way": PLAIN, "batch": batch}, _FIGURES, measure))
    for way in WAYS:
        if way.part == part and not way.compiles and way.suits(facts) is None:
            rows += rows_of_way(way, plain, trials, facts, seconds)
    return rows


def trial_of(work: Work, part: Part, batch: int, seconds: float) -> Trial:
    """One batch size, with plain's own outputs, time and memory."""
    pipeline = work.pipeline
    calls = step_calls(work, batch) if part == "step" else decode_calls(work, batch)
    plain = (pipeline.unet if part == "step" else pipeline.vae).plain
    fresh_memory()
    outputs = [call(plain) for call in calls]
    plain_ms = median_ms(pipeline.device, lambda: plain, calls[0], seconds=seconds)
    plain_gb = peak_reserved_gb()
    exact: list[torch.Tensor] = []
    try:
        in_float32 = InFloat32(plain)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = [call(in_float32) for call in calls]
    except torch.OutOfMemoryError:
        exact = []
    return Trial(batch, calls, outputs, exact, plain_ms, plain_gb)


def step_calls(work: Work, batch: int) -> list[Call]:
    """Of the UNet, at an image's first timestep and at its last."""
    pipeline, samples = work.pipeline, work.noise(batch)
    calls = [pipeline.unet_call(samples)]
    while samples[0].trajectory.following_timestep is not None:
        pipeline.step(samples)
    return [*calls, pipeline.unet_call(samples)]


def decode_calls(work: Work, batch: int) -> list[Call]:
    """Of the decoder, on finished images, as many as one call of it takes."""
    latents = torch.stack([sample.trajectory.latents for sample in work.latents(batch)])
    latents = latents[: vae.most_at_once(work.pipeline.vae.plain, *latents.shape[2:])]
    return [lambda decoder: vae.decode_to_float(decoder, latents)]


def plain_figures(trial: Trial) -> Row:
    """What there is to say of plain itself: above all its own distance from float32."""
    return {
        "build_s": 0.0,
        "first_call_s": None,
        "ms": trial.plain_ms,
        "of_plain": 1.0,
        "verdict": PLAIN,
        "peak_reserved_gb": trial.plain_gb,
        **distances(trial, trial.plain),
    }


def rows_of_way(
    way: Way, plain: Any, trials: Sequence[Trial], facts: Facts, seconds: float
) -> list[Row]:
    """A row for each batch size; where a way raises, its row says what."""
    fresh_memory()
    started = time.perf_counter()
    try:
        with torch.inference_mode(False):  # as at setup
            built = way.build(plain)
    except Exception as error:  # whatever it may be, it is what there is to know of this way
        return [failed(way, trial, error) for trial in trials]
    build_s = round(time.perf_counter() - started, 3)
    rows: list[Row] = []
    for trial in trials:

        def measure(trial: Trial = trial) -> Row:
            return {"build_s": build_s, **way_figures(way, built, trial, facts, seconds)}

        about = {"part": way.part, "way": way.name, "batch": trial.batch}
        try:
            rows.append(measured(about, _FIGURES, measure))
        except Exception as error:
            rows.append(failed(way, trial, error))
    return rows


def failed(way: Way, trial: Trial, error: Exception) -> Row:
    """The row of a way that cannot do this."""
    about = {"part": way.part, "way": way.name, "batch": trial.batch}
    return {**about, "error": in_a_line(error), **dict.fromkeys(_FIGURES)}


def way_figures(way: Way, built: Any, trial: Trial, facts: Facts, seconds: float) -> Row:
    """Time, memory and distances of a way at one batch size."""
    fresh_memory()
    started = time.perf_counter()
    trial.calls[0](built).float().sum().item()  # which waits for the device
    first_call_s = time.perf_counter() - started
    outputs = [call(built) for call in trial.calls]
    ms = median_ms(facts.device, lambda: built, trial.calls[0], seconds=seconds)
    verdict = judge(way.part, trial.plain, outputs, limits_for(facts))
    return {
        "first_call_s": round(first_call_s, 3),
        "ms": ms,
        "of_plain": round(ms / trial.plain_ms, 4),
        "verdict": verdict.problem or "passes",
        "peak_reserved_gb": peak_reserved_gb(),
        **distances(trial, outputs),
    }


def distances(trial: Trial, outputs: Sequence[torch.Tensor]) -> Row:
    """From plain and from float32, |a - b| / |b| of each call; of pictures the pixels' from plain.

    pixels_mean and pixels_most, which 99.9 % are not above, are in steps of 1/255.
    """
    mean = most = None
    if outputs[0].shape[1] == _RGB:
        mean, most = _pixel_differences(trial.plain[0], outputs[0])
    return {
        "to_plain": relative_errors(trial.plain, outputs),
        "to_float32": relative_errors(trial.exact, outputs) if trial.exact else None,
        "pixels_mean": mean,
        "pixels_most": most,
    }


def relative_errors(exact: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> list[float]:
    """Of each call, to three digits."""
    pairs = zip(exact, outputs, strict=True)
    return [float(f"{_relative_error(each, output):.3g}") for each, output in pairs]
