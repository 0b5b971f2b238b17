"""open_engine: from settings to an engine that serves, or to nothing at all."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import StockDiffusers, pixels_of

from dmd2.engine import batch_limits
from dmd2.engine.deadlines import Deadlines
from dmd2.engine.opening import open_engine
from dmd2.fast.tuning import Tuning
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.settings import Settings


def settings_for(folder: Path, outputs: Path, **more: object) -> Settings:
    return Settings(model=str(folder), device="cpu", max_batch=2, output_dir=outputs, **more)


def test_an_engine_serves_as_its_settings_say(
    model_folder: Path, stock: StockDiffusers, tmp_path: Path
) -> None:
    more = {"queue_timeout_s": 11.0, "run_timeout_s": 12.0, "safety": "blur"}
    engine = open_engine(settings_for(model_folder, tmp_path / "outputs", **more))
    assert engine._deadlines == Deadlines(11.0, 12.0)
    assert engine._delivery._safety == "blur"
    assert not engine._pipeline.low_memory
    request = GenerationRequest.resolve(engine.card, prompt="a red circle", seed=3, num_outputs=3)
    result = engine.submit(request).result(timeout=30)
    engine.close()
    assert result.batch_sizes == [2] * 4 + [1] * 4
    for index, path in enumerate(result.paths):
        assert path.is_relative_to(tmp_path / "outputs")
        assert np.abs(pixels_of(path) - stock.image(request, index)).max() <= 1


@pytest.mark.parametrize("asked", [Tuning("quick", compile=True), Tuning("off")])
def test_dtype_memory_and_ways_reach_the_pipeline(
    asked: Tuning, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    monkeypatch.setattr(
        batch_limits,
        "choose_ways",
        lambda _pipeline, _request, tuning, _: chosen.append(tuning) or {},
    )
    more = {"dtype": "bfloat16", "memory": "low", "tune": asked.mode, "compile": asked.compile}
    engine = open_engine(settings_for(model_folder, tmp_path, **more))
    engine.close()
    assert engine._pipeline.dtype == torch.bfloat16
    assert engine._pipeline.vae.plain.use_tiling
    assert chosen == [asked]


def test_one_that_cannot_warm_up_leaves_no_thread(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pipeline: Pipeline, requests: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(Pipeline, "encode", fail)
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="no kernel image"):
        open_engine(settings_for(model_folder, tmp_path))
    assert set(threading.enumerate()) <= before
