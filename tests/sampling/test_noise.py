"""When the noise of an image is drawn, and that it is drawn once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from model_folders import pixels_of
from wrapped_models import Broken

from dmd2.engine.engine import Engine
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling import sampler
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.sampler import Trajectory


def made(engine: Engine, **inputs: Any) -> Any:
    """The pixels of an image in two steps, the last one of several."""
    usual = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 2}
    request = GenerationRequest.resolve(engine.card, **usual | inputs)
    return pixels_of(engine.submit(request).result(timeout=30).paths[-1])


def test_the_first_unet_call_waits_for_its_own_noise_alone(
    pipeline: Pipeline, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    draw, plain = Trajectory._draw, pipeline.unet.plain
    monkeypatch.setattr(Trajectory, "_draw", lambda self: (done.append("noise"), draw(self))[1])
    unet = Broken(plain, lambda output: (done.append("UNet"), output)[1], 0)
    monkeypatch.setattr(pipeline.unet, "plain", unet)
    made(engine)
    assert done == ["noise", "UNet", "noise", "UNet"]


def test_a_step_that_is_tried_again_adds_the_same_noise(
    pipeline: Pipeline, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = made(engine, num_outputs=2)
    add_noise, tried = sampler.add_noise, []

    def failing_once(*args: torch.Tensor) -> torch.Tensor:
        tried.append(len(args[0]))
        if len(tried) == 1:
            raise RuntimeError("a kernel broke")
        return add_noise(*args)

    monkeypatch.setattr(sampler, "add_noise", failing_once)
    result = made(engine, num_outputs=2)
    assert tried[:3] == [2, 1, 1]
    assert np.abs(result - expected).max() <= 1
