"""Distilling a user's own model folder on a folder of pictures, as scripts/train sdxl does it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image

from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from training.config import WarmStartConfig
from training.sdxl.distil import distil_sdxl, sdxl_config


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (80, 64), (80 * number, 40, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a field of colour {number}\n")
    return folder


def test_a_one_step_student_of_a_model_folder_is_served(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    config = sdxl_config(lora=False, one_step=True)
    assert config.warm_start is not None
    assert config.warm_start.num_pairs % config.batch_size == 0
    small = replace(
        config,
        batch_size=2,
        num_steps=1,
        num_fake_updates=1,
        warm_start=WarmStartConfig(num_pairs=4, num_ode_steps=1, num_steps=2, learning_rate=1e-4),
    )
    runs = tmp_path / "runs"
    result = distil_sdxl(
        small, Accelerator(cpu=True), teacher=model_folder, data=pictures, runs=runs, size=64
    )
    steps = [json.loads(line)["step"] for line in (runs / "warm-start/log.jsonl").open()]
    assert steps == [2]
    pipeline = Pipeline.load(result, "cpu", "float32")
    request = GenerationRequest.resolve(pipeline.card, prompt="a field", seed=1)
    assert request.timesteps == (399,)
    sample = pipeline.start(request, 0, *pipeline.encode([request]))
    pipeline.step([sample])
    assert pipeline.decode([sample])[0].pixels().shape == (64, 64, 3)


def test_four_steps_begin_with_the_teachers_weights() -> None:
    assert sdxl_config(lora=True, one_step=False).warm_start is None


@pytest.mark.parametrize(("lora", "rate"), [(False, 5e-7), (True, 5e-5)])
@pytest.mark.parametrize(("one_step", "num_fake_updates"), [(False, 19_000), (True, 24_000)])
def test_rates_and_lengths_are_those_published(
    lora: bool, rate: float, one_step: bool, num_fake_updates: int
) -> None:
    config = sdxl_config(lora=lora, one_step=one_step)
    assert config.student_learning_rate == config.fake_learning_rate == rate
    assert config.num_steps * config.num_fake_updates == num_fake_updates
