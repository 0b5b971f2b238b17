"""A hundred requests at once, of every kind: each image equals its twin that was made alone."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folders import pixels_of
from numpy.typing import NDArray

from dmd2.engine.batch_limits import BatchLimits
from dmd2.engine.engine import Engine
from dmd2.engine.job import GenerationResult
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline

NUM_REQUESTS, NUM_UNWANTED = 100, 16
SIZES = ((64, 64), (64, 64), (64, 64), (128, 64), (72, 104))
PROMPTS = ("a red circle", "a blue square", "", "one " * 90)


def random_inputs(rng: random.Random) -> dict[str, Any]:
    """One request's inputs, drawn so that many have twins with another neighbourhood."""
    width, height = rng.choice(SIZES)
    guidance = rng.choice((0, 0, 0, 2.0, 5.0))
    return {
        "prompt": rng.choice([p for p in PROMPTS if p]),
        "negative_prompt": rng.choice(PROMPTS) if guidance else "",
        "guidance_scale": guidance,
        "width": width,
        "height": height,
        "num_outputs": rng.choice((1, 1, 2, 4)),
        "num_inference_steps": rng.choice((4, 4, 2)),
        "seed": rng.randrange(6),
    }


class Twins:
    """Images made alone, each once."""

    def __init__(self, pipeline: Pipeline, folder: Path) -> None:
        self.engine = Engine(pipeline, folder, BatchLimits(step=1))
        self._made: dict[Any, NDArray[np.int16]] = {}

    def of(self, request: GenerationRequest, index: int) -> NDArray[np.int16]:
        key = (
            request.prompt, request.negative_prompt, request.guidance_scale, request.width,
            request.height, request.timesteps, request.seeds[index],
        )  # fmt: skip
        if key not in self._made:
            alone = GenerationRequest.resolve(
                self.engine.card,
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                guidance_scale=request.guidance_scale,
                width=request.width,
                height=request.height,
                num_inference_steps=request.num_inference_steps,
                seed=request.seeds[index],
            )
            self._made[key] = pixels_of(self.engine.submit(alone).result().paths[0])
        return self._made[key]


@pytest.fixture
def twins(pipeline: Pipeline, tmp_path: Path) -> Iterator[Twins]:
    twins = Twins(pipeline, tmp_path / "alone")
    yield twins
    twins.engine.close()


def test_a_random_load(forced_pipeline: Pipeline, tmp_path: Path, twins: Twins) -> None:
    """By every fast way, and the twins plainly."""
    rng = random.Random(20)
    engine = Engine(forced_pipeline, tmp_path / "together", BatchLimits(step=8, decode=4))
    requests = [
        GenerationRequest.resolve(engine.card, **random_inputs(rng)) for _ in range(NUM_REQUESTS)
    ]
    unwanted = set(rng.sample(range(NUM_REQUESTS), NUM_UNWANTED))
    results = asyncio.run(run_all(engine, requests, unwanted, rng))
    engine.close()
    assert len(results) >= NUM_REQUESTS - len(unwanted)
    assert Counter(size for r in results for size in r.batch_sizes)[8] > 20, "little was shared"
    for result in results:
        assert result.ways == {"step": "lean", "decode": "lean"}
        assert len(result.paths) == result.request.num_outputs
        for index, path in enumerate(result.paths):
            difference = np.abs(pixels_of(path) - twins.of(result.request, index)).max()
            assert difference <= 1, "promise 1: to within 1/255, in company or alone"


async def run_all(
    engine: Engine, requests: list[GenerationRequest], unwanted: set[int], rng: random.Random
) -> list[GenerationResult]:
    """The results of all that were not cancelled, which come and go at random moments."""
    tasks = []
    for number, request in enumerate(requests):
        task = asyncio.create_task(engine.generate(request))
        tasks.append(task)
        if number in unwanted:
            asyncio.get_running_loop().call_later(rng.uniform(0, 1.5), task.cancel)
        await asyncio.sleep(rng.choice((0, 0, 0.01)))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, BaseException):
            assert number in unwanted
            assert isinstance(outcome, asyncio.CancelledError)
    return [outcome for outcome in outcomes if isinstance(outcome, GenerationResult)]
