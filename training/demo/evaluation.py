"""What the demo's models can do, measured: made into training/RESULTS.md by one command."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dmd2.models import vae
from dmd2.models.loading import load_parts
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.sampler import Trajectory
from training.demo.drawing import draw
from training.demo.drawings import Source
from training.demo.frechet import features, frechet_distance, mean_distance
from training.demo.icons import SUBJECT
from training.demo.judge import load_judge, score
from training.demo.language import COLOURS
from training.demo.nearest import in_the_center, nearest
from training.demo.scenes import IMAGE_SIZE, Described, caption_of, sample
from training.method.conditioning import NoisePredictor, condition
from training.method.ode import follow_ode

SEED = 77  # of the evaluation's scenes; training uses others
_BATCH = 25
Painter = Callable[[Sequence[str], Sequence[int]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Sizes:
    """How many pictures each figure rests on.

    Attributes:
        alone: held-out captions of one thing.
        pairs: held-out captions of two things.
        frechet: captions of the training's kind for the Fréchet distance.
        diversity: seeds of one caption.
        subject: seeds of each caption that asks for the LoRA's subject.
    """

    alone: int = 500
    pairs: int = 300
    frechet: int = 600
    diversity: int = 48
    subject: int = 8


@dataclass(frozen=True)
class Standards:
    """What pictures are held to.

    Attributes:
        source: of the drawings.
        judge: the weights of what reads the pictures.
    """

    source: Source
    judge: Path


@dataclass(frozen=True)
class Share:
    """So many right of so many asked."""

    right: int
    asked: int

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share behind it (1927), as shares 0..1."""
        n, z = self.asked, 1.96
        middle = (self.right + z * z / 2) / (n + z * z)
        spread = z / (n + z * z) * math.sqrt(self.right * (n - self.right) / n + z * z / 4)
        return max(0.0, middle - spread), min(1.0, middle + spread)


@dataclass(frozen=True)
class Figures:
    """What was measured of one way to make pictures.

    Attributes:
        alone, pairs: pictures with an attribute right, by its name as judge.score has it.
        frechet: distance to the drawings of the captions' own scenes.
        diversity: mean feature distance between pictures of one caption, over that of drawings.
        seconds: for one picture, in batches of 25.
    """

    alone: dict[str, Share]
    pairs: dict[str, Share]
    frechet: float
    diversity: float
    seconds: float


def few_step_painter(folder: Path, num_steps: int) -> Painter:
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
    teacher, alphas_cumprod = NoisePredictor(parts.unet), parts.alphas_cumprod.to(device)

    @torch.inference_mode()
    def paint(captions: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        conditioning = condition(list(captions), parts.tokenizers, parts.text_encoders, shape)
        noise = torch.stack([Trajectory((999,), shape, seed, device).latents for seed in seeds])
        latents = follow_ode(
            teacher,
            noise,
            conditioning,
            alphas_cumprod,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
        )
        pixels, _ = vae.decode(parts.vae, latents)
        return pixels.cpu().numpy()

    return paint


def measure(paint: Painter, sizes: Sizes, standards: Standards) -> Figures:
    """All figures of one painter."""
    alone = [sample(SEED, i, held_out=True, num_objects=1) for i in range(sizes.alone)]
    pairs = [sample(SEED, i, held_out=True, num_objects=2) for i in range(sizes.pairs)]
    usual = [sample(SEED, i) for i in range(sizes.frechet)]
    started = time.perf_counter()
    pictures = _paint_all(paint, alone)
    seconds = (time.perf_counter() - started) / len(alone)
    alone_shares = shares(alone, pictures, standards)
    pair_shares = shares(pairs, _paint_all(paint, pairs), standards)
    painted = features(_paint_all(paint, usual))
    same = scenes_of_one_caption(sizes.diversity)
    spread = mean_distance(features(_paint_all(paint, same)))
    return Figures(
        alone=alone_shares,
        pairs=pair_shares,
        frechet=frechet_distance(painted, features(drawn(usual, standards.source))),
        diversity=spread / mean_distance(features(drawn(same, standards.source))),
        seconds=seconds,
    )


def measure_judge(sizes: Sizes, standards: Standards) -> tuple[dict[str, Share], dict[str, Share]]:
    """How often the judge is right about drawings that it was not trained on: alone, pairs."""
    alone, pairs = (
        [sample(SEED, i, held_out=True, num_objects=num) for i in range(count)]
        for num, count in ((1, sizes.alone), (2, sizes.pairs))
    )
    source = standards.source
    return (
        shares(alone, drawn(alone, source), standards),
        shares(pairs, drawn(pairs, source), standards),
    )


def measure_subject(paint: Painter, sizes: Sizes, source: Source) -> Share:
    """In how many pictures that ask for the LoRA's subject it is the nearest drawing.

    It stands large in the middle of a plain colour, but for orange, which is much like it.
    """
    right = 0
    backgrounds = [colour for colour in COLOURS if colour != "orange"]
    for background in backgrounds:
        scene = in_the_center(SUBJECT, background)
        caption = caption_of(scene, frozenset({"size", "background", "position"}))
        pictures = paint([caption] * sizes.subject, range(sizes.subject))
        right += nearest(pictures, background, source).count(SUBJECT)
    return Share(right, len(backgrounds) * sizes.subject)


def frechet_noise(sizes: Sizes, source: Source) -> float:
    """The distance between two sets of drawings, which only chance parts."""
    first, second = (
        drawn([sample(seed, i) for i in range(sizes.frechet)], source) for seed in (SEED, SEED + 1)
    )
    return frechet_distance(features(first), features(second))


def shares(
    asked: Sequence[Described], pictures: NDArray[np.uint8], standards: Standards
) -> dict[str, Share]:
    """For each attribute that a caption tells, how many pictures have it right."""
    outcomes: dict[str, list[bool]] = {}
    for described, reading in zip(asked, load_judge(standards.judge).read(pictures), strict=True):
        for name, is_right in score(reading, described.scene).items():
            if name in ("size", "position") and name not in described.said:
                continue
            outcomes.setdefault(name, []).append(is_right)
    return {name: Share(sum(values), len(values)) for name, values in outcomes.items()}


def drawn(described: Sequence[Described], source: Source) -> NDArray[np.uint8]:
    """The data's own pictures of the scenes."""
    return np.stack([draw(d.scene, source.drawings()) for d in described])


def scenes_of_one_caption(num: int) -> list[Described]:
    """Scenes of the data that one caption fits: a fox, wherever and however large it is."""
    found: list[Described] = []
    index = 0
    while len(found) < num:
        described = sample(SEED + 2, index, num_objects=1)
        if described.scene.objects[0].thing == "fox":
            found.append(Described(described.scene, "a fox", frozenset()))
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
