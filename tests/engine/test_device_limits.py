"""What is too much for the device: memory, a convolution's counters, half precision's range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from model_folders import pixels_of

from dmd2.engine.engine import Engine
from dmd2.errors import DeviceMemoryError, GenerationError
from dmd2.models import vae
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.sample import Sample


def request(engine: Engine, **inputs: Any) -> GenerationRequest:
    return GenerationRequest.resolve(engine.card, **{"prompt": "a red circle", "seed": 7} | inputs)


def test_what_does_not_fit_together_is_done_one_by_one(
    engine: Engine, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pixels_of(engine.submit(request(engine, seed=8)).result().paths[0])
    unet, tried = pipeline.unet.plain, []

    def small_memory(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tried.append(len(latents))
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return unet(latents, *args, **kwargs)

    small_memory.config = unet.config  # type: ignore[attr-defined]
    monkeypatch.setattr(pipeline.unet, "plain", small_memory)
    result = engine.submit(request(engine, num_outputs=2)).result(timeout=20)
    assert tried == [2, 1, 1] + [1] * 6, "the limit was lowered for good"
    assert np.abs(pixels_of(result.paths[1]) - expected).max() <= 1


@pytest.mark.parametrize("what", ["encode", "decode", "decode again"])
def test_what_does_not_fit_alone_is_an_error_with_a_way_out(
    what: str, engine: Engine, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def overflowing(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, is_finite = decode(model, latents)
        return pixels, torch.zeros_like(is_finite)

    decode = vae.decode
    with monkeypatch.context() as patch:
        if what == "decode again":
            patch.setattr(vae, "decode", overflowing)
            patch.setattr(vae, "decode_in_float32", no_memory)
        else:
            part = {"encode": pipeline._text_encoder, "decode": pipeline.vae.plain}[what]
            patch.setattr(part, what, no_memory)
        failing = engine.submit(request(engine))
        with pytest.raises(DeviceMemoryError, match=r"of memory\. Ask for a smaller"):
            failing.result(timeout=20)
    assert engine.submit(request(engine)).result(timeout=20).paths[0].exists()


def test_decodes_stay_within_what_a_convolution_can_count(
    engine: Engine, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL's widest layer has 256 channels at full resolution: 7 megapixels, and not 8."""
    with torch.device("meta"):
        sdxl = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    assert vae.most_at_once(sdxl, 128, 128) == 7
    assert vae.most_at_once(sdxl, 256, 244) == 2
    assert vae.most_at_once(sdxl, 10**4, 10**4) == 1
    monkeypatch.setattr(vae, "_MAX_ELEMENTS", 2 * 16 * 64 * 64)
    sizes, decode = [], pipeline.vae.plain.decode
    monkeypatch.setattr(
        pipeline.vae.plain, "decode", lambda z, **more: (sizes.append(len(z)), decode(z, **more))[1]
    )
    samples = [sample_of(pipeline, seed) for seed in range(5)]
    alone = [pipeline.decode([sample])[0].pixels() for sample in samples]
    assert sizes == [1] * 5
    together = [picture.pixels() for picture in pipeline.decode(samples)]
    assert sizes[5:] == [2, 2, 1]
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def sample_of(pipeline: Pipeline, seed: int) -> Sample:
    """A finished image whose latents are noise."""
    asked = GenerationRequest.resolve(pipeline.card, prompt="x", seed=seed)
    sample = pipeline.start(asked, 0, *pipeline.encode([asked]))
    while not sample.trajectory.done:
        sample.trajectory.advance(sample.trajectory.latents)
    return sample


class OverflowingVAE(torch.nn.Module):
    """A decoder that overflows in half precision, as SDXL's own VAE does."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((), gain, dtype=torch.float16))
        self.config = type("Config", (), {"scaling_factor": 1.0})

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        assert not return_dict
        return ((latents[:, :3] * self.weight * self.weight) / self.weight / self.weight,)


@torch.inference_mode()
def test_a_decode_that_overflows_is_done_again_in_float32() -> None:
    latents = torch.linspace(-1, 1, 4 * 8 * 8).reshape(4, 8, 8)
    decoder = OverflowingVAE(6e4)
    _, is_finite = vae.decode(decoder, latents[None])
    assert not is_finite.any()
    (image,) = vae.decode_in_float32(decoder, latents[None])
    expected = ((latents[:3] / 2 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 0)
    assert (image.int() - expected.int()).abs().max() <= 1
    assert image.float().std() > 10
    assert decoder.dtype == torch.float16
    assert decoder.weight.item() == torch.tensor(6e4, dtype=torch.float16).item()


@torch.inference_mode()
def test_what_is_never_finite_is_an_error_and_not_a_black_image() -> None:
    with pytest.raises(GenerationError, match="float32 too"):
        vae.decode_in_float32(OverflowingVAE(float("inf")), torch.ones(1, 4, 8, 8))
    with pytest.raises(GenerationError, match="latents"):
        vae.decode_in_float32(OverflowingVAE(1.0), torch.full((1, 4, 8, 8), float("nan")))
