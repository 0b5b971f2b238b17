"""What needs a CUDA GPU or SDXL's own weights: skipped elsewhere, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import SDXL, StockDiffusers, pixels_of

from dmd2.engine.batch_limits import warm_up
from dmd2.engine.engine import Engine
from dmd2.errors import DeviceMemoryError
from dmd2.fast import tuning
from dmd2.fast.budget import Budget
from dmd2.fast.cuda_capture import CudaCapture
from dmd2.fast.graphs import Graphed
from dmd2.fast.tuning import Tuning
from dmd2.fast.unet import lean_unet
from dmd2.fast.ways import WAYS, Way
from dmd2.models import device_work
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways
from dmd2.settings import TuneMode
from dmd2.store.manifest import Manifest, verify


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "mean_limit"), [("float32", 0.1), ("float16", 0.1), ("bfloat16", 0.6)]
)
def test_cuda_makes_the_pictures_of_the_cpu(
    dtype: str, mean_limit: float, model_folder: Path, tmp_path: Path
) -> None:
    pipeline = Pipeline.load(model_folder, "cuda", dtype)
    assert {p.device.type for p in pipeline.unet.plain.parameters()} == {"cuda"}
    engine = Engine(pipeline, tmp_path)
    request = GenerationRequest.resolve(engine.card, prompt="a red circle", seed=7, num_outputs=4)
    result = engine.submit(request).result()
    engine.close()
    stock = StockDiffusers(model_folder)
    for index, path in enumerate(result.paths):
        assert np.abs(pixels_of(path) - stock.image(request, index)).mean() <= mean_limit


@pytest.mark.gpu
def test_the_engine_tells_of_the_gpu_s_memory(model_folder: Path, tmp_path: Path) -> None:
    engine = Engine(Pipeline.load(model_folder, "cuda"), tmp_path)
    engine.warm_up(max_batch=1)
    memory = engine.tally.memory()
    engine.close()
    assert memory is not None
    reserved, total = memory
    assert 0 < reserved <= total
    assert total == pytest.approx(torch.cuda.mem_get_info()[1], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["lean", "graph"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_judge_lets_exact_ways_pass(
    dtype: str, step: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_FASTER", 1e9)
    pipeline = Pipeline.load(model_folder, "cuda", dtype)
    request = GenerationRequest.resolve(pipeline.card, prompt="a red circle", seed=7)
    ways = [way for way in WAYS if way.name == (step if way.part == "step" else "lean")]
    choose_ways(pipeline, request, Tuning(), Budget(60), ways)
    assert (pipeline.unet.way, pipeline.vae.way) == (step, "lean")


@pytest.mark.gpu
@pytest.mark.compiles
def test_compiled_ways_are_used_where_they_are_asked_for(model_folder: Path) -> None:
    """So they were judged to be close enough; a C compiler has to be there, for Triton."""
    pipeline = Pipeline.load(model_folder, "cuda")
    try:
        warm_up(pipeline, 2, Tuning("off", compile=True))
    finally:
        torch.compiler.set_stance("default")
    assert (pipeline.unet.way, pipeline.vae.way) == ("compiled", "compiled")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["off", "force"])
def test_the_steps_never_wait_for_the_device(mode: TuneMode, model_folder: Path) -> None:
    pipeline = Pipeline.load(model_folder, "cuda")
    warm_up(pipeline, 1, Tuning(mode))
    requests = [
        GenerationRequest.resolve(pipeline.card, prompt="a red circle", seed=seed, guidance_scale=3)
        for seed in range(2)
    ]
    conditioning = pipeline.encode(requests)
    samples = [pipeline.start(r, 0, c) for r, c in zip(requests, conditioning, strict=True)]
    pipeline.step(samples)  # the first one makes cuDNN choose its kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        while not samples[0].trajectory.done:
            pipeline.step(samples)
        pictures = pipeline.decode(samples)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(picture.pixels().std() > 5 for picture in pictures)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_graphs_make_the_lean_unets_latents_bit_for_bit(dtype: str, model_folder: Path) -> None:
    """Whatever is captured, several images under way, changed weights included; nothing waits."""
    pipeline = Pipeline.load(model_folder, "cuda", dtype)
    sizes: list[dict[str, Any]] = [{}, {"guidance_scale": 3}, {}, {"width": 72, "height": 64}]
    requests = [
        GenerationRequest.resolve(pipeline.card, prompt=f"{seed} circles", seed=seed, **size)
        for seed, size in enumerate(sizes)
    ]
    conditioning = pipeline.encode(requests)

    def latents(way: Way) -> list[torch.Tensor]:
        choose_ways(pipeline, requests[0], Tuning("force"), Budget(), [way])
        samples = [pipeline.start(r, 0, c) for r, c in zip(requests, conditioning, strict=True)]
        warm = [sample.from_start() for sample in samples]
        for each in warm:
            pipeline.step([each])  # the first step captures; cuDNN chooses for all sizes
        pipeline.step([warm[0], warm[2]])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                for each in samples:
                    pipeline.step([each])
                pipeline.step([samples[0], samples[2]])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert {name for sample in samples for name in sample.ways["step"]} == {way.name}
        return [sample.trajectory.latents for sample in samples]

    ways = {way.name: way for way in WAYS if way.part == "step"}
    graphed, lean = latents(ways["graph"]), latents(ways["lean"])
    assert all(map(torch.equal, graphed, lean))
    choose_ways(pipeline, requests[0], Tuning("force"), Budget(), [ways["graph"]])
    first = pipeline.unet_call([pipeline.start(requests[0], 0, conditioning[0])])
    before = pipeline.unet(first)
    with torch.inference_mode():
        pipeline.unet.plain.conv_out.weight.mul_(0.5)
        after, expected = pipeline.unet(first), first(lean_unet(pipeline.unet.plain))
    assert pipeline.unet.way == "graph"
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


@pytest.mark.gpu
def test_graphs_that_are_dropped_give_their_memory_back(model_folder: Path) -> None:
    pipeline = Pipeline.load(model_folder, "cuda")
    request = GenerationRequest.resolve(pipeline.card, prompt="a red circle", seed=7)
    (conditioning,) = pipeline.encode([request])
    pipeline.step([pipeline.start(request, 0, conditioning)])
    ways = [way for way in WAYS if way.name == "graph"]
    reserved = []
    for _ in range(3):
        choose_ways(pipeline, request, Tuning("force"), Budget(), ways)
        pipeline.step([pipeline.start(request, 0, conditioning)])
        assert pipeline.unet.way == "graph"
        with_graphs = device_work.reserved_memory()
        pipeline.unet.drop("was a test's")
        reserved.append(device_work.reserved_memory())
        assert reserved[-1] < with_graphs
    assert reserved[0] == reserved[1] == reserved[2]


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_device_as_it_was(model_folder: Path) -> None:
    pipeline = Pipeline.load(model_folder, "cuda")
    request = GenerationRequest.resolve(pipeline.card, prompt="a red circle", seed=7)
    (conditioning,) = pipeline.encode([request])
    plainly = pipeline.start(request, 0, conditioning)
    sample = plainly.from_start()
    pipeline.step([plainly])

    class Waiting(torch.nn.Module):
        """Waits for the device, which a capture must not."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = pipeline.unet.plain(*args, **kwargs)
            return output if output[0].isfinite().all() else None

    (way,) = (way for way in WAYS if way.name == "graph")
    pipeline.unet.adopt(way, Graphed(Waiting(), CudaCapture()))
    stream = torch.cuda.current_stream()
    pipeline.step([sample])
    assert (pipeline.unet.way, sample.ways["step"]) == ("plain", ["plain"])
    assert torch.cuda.current_stream() == stream
    assert torch.equal(sample.trajectory.latents, plainly.trajectory.latents)
    del plainly
    torch.cuda.empty_cache()  # torch's allocator would refuse if it took the capture to go on
    pipeline.unet.adopt(way, way.build(pipeline.unet.plain))
    pipeline.step([sample])
    assert sample.ways["step"] == ["plain", "graph"]


@pytest.mark.gpu
def test_what_does_not_fit_into_a_small_gpu_is_an_error_and_nothing_more(
    model_folder: Path, tmp_path: Path
) -> None:
    engine = Engine(Pipeline.load(model_folder, "cuda"), tmp_path)
    sides = {"width": 2048, "height": 1952}
    large = GenerationRequest.resolve(engine.card, prompt="x", num_outputs=4, **sides)
    small = GenerationRequest.resolve(engine.card, prompt="x", seed=1)
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        with pytest.raises(DeviceMemoryError, match="DMD2_MEMORY=low"):
            engine.submit(large).result()
        assert engine.submit(small).result().paths[0].exists()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        engine.close()


@pytest.mark.weights
def test_installed_sdxl_is_whole_and_loads() -> None:
    assert verify(Manifest.read().models["sdxl-4step"], SDXL) == []
    Pipeline.load(SDXL, "auto")


@pytest.mark.gpu
@pytest.mark.weights
def test_sdxl_equals_stock_diffusers_in_half_precision(tmp_path: Path) -> None:
    engine = Engine(Pipeline.load(SDXL, "cuda"), tmp_path)
    request = GenerationRequest.resolve(engine.card, prompt="a lighthouse in a storm", seed=7)
    (path,) = engine.submit(request).result().paths
    engine.close()
    expected = StockDiffusers(SDXL, torch.float16).to("cuda").image(request, 0)
    assert expected.std() > 20
    assert np.abs(pixels_of(path) - expected).mean() <= 6
