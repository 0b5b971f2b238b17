"""What the demo's models can do, measured: made into training/RESULTS.md by one command."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray

from dmd2.models import vae
from dmd2.models.loading import load_parts
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.sampler import Trajectory, guide
from training.demo.checker import read, score
from training.demo.drawing import draw
from training.demo.frechet import features, frechet_distance, mean_distance
from training.demo.scenes import IMAGE_SIZE, Described, sample
from training.method.conditioning import condition

SEED = 77  # of the evaluation's scenes; training uses others
_BATCH = 25
Painter = Callable[[Sequence[str], Sequence[int]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Sizes:
    """How many pictures each figure rests on.

    Attributes:
        alone: held-out captions of one object.
        pairs: held-out captions of two objects.
        frechet: captions of the training's kind for the Fréchet distance.
        diversity: seeds of one caption.
    """

    alone: int = 500
    pairs: int = 200
    frechet: int = 600
    diversity: int = 48


@dataclass(frozen=True)
class Figures:
    """What was measured of one way to make pictures.

    Attributes:
        alone, pairs: shares 0..1 of pictures with an attribute right, by its name; "all" is
            background, colour and shape together (for pairs background, both colours, both
            shapes and the relation).
        frechet: distance to the drawings of the captions' own scenes.
        diversity: mean feature distance between pictures of one caption, over that of drawings.
        seconds: for one picture, in batches of 25.
    """

    alone: dict[str, float]
    pairs: dict[str, float]
    frechet: float
    diversity: float
    seconds: float


def few_step_painter(folder: Path, num_steps: int, guidance_scale: float = 0.0) -> Painter:
    """Pictures as the container makes them from a model folder."""
    pipeline = Pipeline.load(folder, "auto", "float32")

    def paint(captions: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        samples = []
        for caption, seed in zip(captions, seeds, strict=True):
            request = GenerationRequest.resolve(
                pipeline.card,
                prompt=caption,
                seed=seed,
                num_inference_steps=num_steps,
                guidance_scale=guidance_scale,
            )
            samples.append(pipeline.start(request, 0, *pipeline.encode([request])))
        while not samples[0].trajectory.done:
            pipeline.step(samples)
        return np.stack([picture.pixels() for picture in pipeline.decode(samples)])

    return paint


def many_step_painter(folder: Path, num_steps: int, guidance_scale: float) -> Painter:
    """Pictures by DDIM (arXiv 2010.02502) with classifier-free guidance: the teacher's best."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = load_parts(folder, device, torch.float32)
    shape = (4, IMAGE_SIZE // 8, IMAGE_SIZE // 8)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(num_steps)

    @torch.inference_mode()
    def paint(captions: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        conditioning = condition(list(captions), parts.tokenizers, parts.text_encoders, shape)
        both = conditioning.dropped().followed_by(conditioning).unet_inputs()
        starts = [Trajectory((999,), shape, seed, device).latents for seed in seeds]
        latents = torch.stack(starts)
        for t in scheduler.timesteps:
            times = t.expand(2 * len(latents)).to(device)
            noise_pred = parts.unet(torch.cat([latents, latents]), times, **both).sample
            uncond, cond = noise_pred.chunk(2)
            guided = guide(uncond, cond, guidance_scale)
            latents = scheduler.step(guided, t, latents).prev_sample
        pixels, _ = vae.decode(parts.vae, latents)
        return pixels.cpu().numpy()

    return paint


def measure(paint: Painter, sizes: Sizes) -> Figures:
    """All figures of one painter."""
    alone = [sample(SEED, i, held_out=True, num_objects=1) for i in range(sizes.alone)]
    pairs = [sample(SEED, i, held_out=True, num_objects=2) for i in range(sizes.pairs)]
    usual = [sample(SEED, i) for i in range(sizes.frechet)]
    started = time.perf_counter()
    pictures = _paint_all(paint, alone)
    seconds = (time.perf_counter() - started) / len(alone)
    alone_shares = shares(alone, pictures)
    pair_shares = shares(pairs, _paint_all(paint, pairs))
    distance = frechet_distance(features(_paint_all(paint, usual)), features(drawings(usual)))
    same = scenes_of_one_caption(sizes.diversity)
    spread = mean_distance(features(_paint_all(paint, same)))
    return Figures(
        alone=alone_shares,
        pairs=pair_shares,
        frechet=distance,
        diversity=spread / mean_distance(features(drawings(same))),
        seconds=seconds,
    )


def frechet_noise(sizes: Sizes) -> float:
    """The distance between two sets of drawings, which only chance parts."""
    first, second = (
        drawings([sample(seed, i) for i in range(sizes.frechet)]) for seed in (SEED, SEED + 1)
    )
    return frechet_distance(features(first), features(second))


def shares(asked: Sequence[Described], pictures: NDArray[np.uint8]) -> dict[str, float]:
    """For each attribute that a caption tells, the share of pictures that have it right."""
    outcomes: dict[str, list[bool]] = {}
    for described, picture in zip(asked, pictures, strict=True):
        scores = score(read(picture), described.scene)
        is_pair = described.scene.relation is not None
        told = {"background", "count"}
        told |= {"shapes", "colours", "relation"} if is_pair else {"shape", "colour"}
        told |= {"sizes" if is_pair else "size"} if "size" in described.said else set()
        told |= described.said & {"smiling", "position"}
        for name in told & set(scores):
            outcomes.setdefault(name, []).append(scores[name])
        outcomes.setdefault("all", []).append(
            all(
                scores[name]
                for name in ("background", "shape", "colour", "shapes", "colours", "relation")
                if name in scores
            )
        )
    return {name: float(np.mean(values)) for name, values in outcomes.items()}


def drawings(described: Sequence[Described]) -> NDArray[np.uint8]:
    """The data's own pictures of the scenes."""
    return np.stack([draw(d.scene) for d in described])


def scenes_of_one_caption(num: int) -> list[Described]:
    """Scenes of the data that one caption fits: a star, whatever else it is."""
    found: list[Described] = []
    index = 0
    while len(found) < num:
        described = sample(SEED + 2, index, num_objects=1)
        if described.scene.objects[0].shape == "star" and not described.scene.objects[0].smiling:
            found.append(Described(described.scene, "a star", frozenset()))
        index += 1
    return found


def _paint_all(paint: Painter, described: Sequence[Described]) -> NDArray[np.uint8]:
    """Pictures of the captions, number i from seed i."""
    pictures = []
    for start in range(0, len(described), _BATCH):
        part = described[start : start + _BATCH]
        captions = [d.caption for d in part]
        pictures.append(paint(captions, range(start, start + len(part))))
    return np.concatenate(pictures)
