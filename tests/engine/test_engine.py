"""The engine: order, cancellation, failures, and models that stay as they were."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folders import pixels_of

from dmd2.engine import image_io
from dmd2.engine.batch_limits import BatchLimits
from dmd2.engine.engine import Engine
from dmd2.engine.job import GenerationResult
from dmd2.errors import GenerationError
from dmd2.fast.tuning import Tuning
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.sample import Sample


def request(engine: Engine, **inputs: Any) -> GenerationRequest:
    return GenerationRequest.resolve(engine.card, **{"prompt": "a red circle", "seed": 7} | inputs)


# For tests whose own request is pytest's.
asked = request


def fingerprint(pipeline: Pipeline) -> str:
    """A hash of every parameter and buffer of every model."""
    digest = hashlib.sha256()
    models = [pipeline.unet.plain, pipeline.vae.plain, *pipeline._text_encoder._encoders]
    for model in models:
        for tensor in [*model.parameters(), *model.buffers()]:
            digest.update(str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class Gate:
    """Holds the GPU thread at each UNet step until it is let on, and counts the steps."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self.steps: list[list[int]] = []
        self._step = pipeline.step
        monkeypatch.setattr(pipeline, "step", self._gated)

    def let(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._go.release()

    def _gated(self, samples: Sequence[Sample]) -> None:
        self.reached.release()
        assert self._go.acquire(timeout=20)
        self.steps.append([sample.trajectory.timestep for sample in samples])
        self._step(samples)


def test_files_are_there_complete_and_named_apart(engine: Engine) -> None:
    futures = [engine.submit(request(engine, num_outputs=3, output_format="webp")) for _ in "ab"]
    paths = [path for future in futures for path in future.result().paths]
    assert len({path.name for path in paths}) == 6
    assert [path.stem[-2:] for path in paths] == ["-0", "-1", "-2"] * 2
    assert len({path.parent for path in paths}) == 2
    assert all(path.suffix == ".webp" and pixels_of(path).shape == (64, 64, 3) for path in paths)


def test_any_image_can_be_made_again_alone(engine: Engine) -> None:
    together = engine.submit(request(engine, num_outputs=4, seed=11)).result()
    for index, seed in enumerate(together.request.seeds):
        (alone,) = engine.submit(request(engine, seed=seed)).result().paths
        difference = np.abs(pixels_of(together.paths[index]) - pixels_of(alone)).max()
        assert difference <= 1, "promise 1: to within 1/255, in company or alone"


def test_requests_are_served_in_order(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(pipeline, tmp_path, BatchLimits(step=2))
    gate = Gate(pipeline, monkeypatch)
    finished: list[str] = []
    futures = []
    for name, steps in (("first", 4), ("second", 2), ("third", 4)):
        future = engine.submit(request(engine, num_inference_steps=steps, num_outputs=2))
        future.add_done_callback(lambda _, name=name: finished.append(name))
        futures.append(future)
    gate.let(10)
    for future in futures:
        future.result(timeout=20)
    assert finished == ["first", "second", "third"]
    four, two = [[t, t] for t in (999, 749, 499, 249)], [[999, 999], [499, 499]]
    assert gate.steps == four + two + four
    engine.close()


def test_a_newcomer_joins_at_the_next_step(
    engine: Engine, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(pipeline, monkeypatch)
    first = engine.submit(request(engine))
    gate.reached.acquire(timeout=20)  # the thread now stands in the first step
    second = engine.submit(request(engine, num_inference_steps=2, seed=9))
    gate.let(4)
    assert first.result(timeout=20).batch_sizes == [1, 2, 2, 1]
    assert second.result(timeout=20).batch_sizes == [2, 2]
    assert gate.steps == [[999], [749, 999], [499, 499], [249]]


@pytest.mark.parametrize("models", ["pipeline", "forced_pipeline"])
def test_a_cancelled_request_stops_before_its_next_step(
    models: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = request.getfixturevalue(models)
    engine = Engine(pipeline, tmp_path)
    gate = Gate(pipeline, monkeypatch)
    before = fingerprint(pipeline)

    async def cancel_in_the_second_step() -> GenerationResult:
        unwanted = asyncio.create_task(engine.generate(asked(engine)))
        await asyncio.to_thread(gate.reached.acquire, timeout=20)
        wanted = asyncio.create_task(engine.generate(asked(engine, seed=9)))
        await asyncio.sleep(0)  # it is on its way
        gate.let(1)
        await asyncio.to_thread(gate.reached.acquire, timeout=20)
        unwanted.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unwanted
        gate.let(4)
        return await wanted

    result = asyncio.run(cancel_in_the_second_step())
    assert gate.steps == [[999], [749, 999], [749], [499], [249]]
    monkeypatch.undo()
    (again,) = engine.submit(asked(engine, seed=9)).result().paths
    assert np.abs(pixels_of(again) - pixels_of(result.paths[0])).max() <= 1
    assert fingerprint(pipeline) == before
    engine.close()


def test_a_failing_step_fails_its_request_only(
    engine: Engine, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(pipeline)
    whole = engine.submit(request(engine)).result().paths[0].read_bytes()
    step = pipeline.step

    def fail_at_499(samples: Sequence[Sample]) -> None:
        if any(s.trajectory.timestep == 499 and s.conditioning.guidance_scale for s in samples):
            raise RuntimeError("a kernel broke")
        step(samples)

    monkeypatch.setattr(pipeline, "step", fail_at_499)
    # A scale of 1 is no guidance, but tells the two apart.
    bad, good = engine.submit(request(engine, guidance_scale=1)), engine.submit(request(engine))
    with pytest.raises(RuntimeError, match="a kernel broke"):
        bad.result(timeout=20)
    assert good.result(timeout=20).paths[0].read_bytes() == whole
    assert fingerprint(pipeline) == before


def test_setup_hears_of_a_warm_up_that_fails(
    engine: Engine, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(samples: Sequence[Sample]) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(pipeline, "step", fail)
    with pytest.raises(RuntimeError, match="no kernel image"):
        engine.warm_up(tuning=Tuning("off"))


def test_a_file_that_cannot_be_written_fails_its_request_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_io, "write", full)
    with pytest.raises(GenerationError, match=r"could not be saved.*No space"):
        engine.submit(request(engine, num_outputs=2)).result(timeout=20)
    monkeypatch.undo()
    assert engine.submit(request(engine)).result(timeout=20).paths[0].exists()


def test_an_image_that_cannot_be_taken_for_delivery_fails_its_request_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(engine._delivery._savers, "submit", no_thread)
    with pytest.raises(RuntimeError, match="new thread"):
        engine.submit(request(engine)).result(timeout=20)
    monkeypatch.undo()
    assert engine.submit(request(engine)).result(timeout=20).paths[0].exists()
    assert engine.problem() is None


def test_stages_are_timed_and_cut_words_reported(engine: Engine) -> None:
    result = engine.submit(request(engine, prompt="one " * 75 + "cut here")).result()
    assert result.unread == {"prompt": "cut here"}
    assert result.notes == ["prompt was cut at 77 tokens; the metric unread has the rest"]
    assert list(result.seconds) == ["queue", "encode", "sample", "decode", "check", "save"]
    assert result.batch_sizes == [1] * 4
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert engine.submit(request(engine, prompt="one " * 75)).result().notes == []
    guided = request(engine, negative_prompt="two " * 75 + "cut too", guidance_scale=2)
    assert engine.submit(guided).result().unread == {"negative_prompt": "cut too"}


def test_closing_fails_what_is_unfinished(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(pipeline, tmp_path)
    gate = Gate(pipeline, monkeypatch)
    futures = [engine.submit(request(engine)) for _ in range(3)]
    gate.reached.acquire(timeout=20)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.let(1)
    closing.join(timeout=20)
    for future in futures:
        with pytest.raises(GenerationError, match="closed"):
            future.result(timeout=20)
    with pytest.raises(GenerationError, match="closed"):
        engine.submit(request(engine))
