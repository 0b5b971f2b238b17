"""All models of one checkpoint: load them, and take a batch of images one step further."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dmd2 import sampler, vae
from dmd2.errors import DeviceMemoryError, GenerationError
from dmd2.loading import ModelParts, choose_device, choose_dtype, is_low, load_parts
from dmd2.model_card import ModelCard
from dmd2.request import GenerationRequest
from dmd2.sampler import Trajectory
from dmd2.text_encoder import TextEmbeds, TextEncoder
from dmd2.weights import quick_problems

log = logging.getLogger(__name__)


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def memory_errors(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a method that runs out of the device's memory give back what it took, and say so."""

    @wraps(method)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return method(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            said = str(error).partition(". ")[0]
        # Only here has the failed call let go of its tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise DeviceMemoryError(
            f"{said}. Ask for a smaller image or fewer at once, or run with DMD2_MEMORY=low"
        )

    return guarded


@dataclass(frozen=True)
class Conditioning:
    """What steers the images of one request.

    Attributes:
        embeds: one entry, or two with classifier-free guidance: negative, then positive.
        add_time_ids: [1, 6] in the model's dtype.
        guidance_scale: acts where there are two entries.
    """

    embeds: tuple[TextEmbeds, ...]
    add_time_ids: torch.Tensor
    guidance_scale: float


@dataclass(frozen=True, eq=False)
class Sample:
    """One image under way; fast_decode chooses what makes its pixels."""

    trajectory: Trajectory
    conditioning: Conditioning
    fast_decode: bool


@dataclass(frozen=True)
class Picture:
    """A decoded image on its way to the host."""

    _pixels: torch.Tensor
    _is_finite: torch.Tensor
    _wait: Callable[[], None]
    _decode_again: Callable[[], NDArray[np.uint8]]

    def pixels(self) -> NDArray[np.uint8]:
        """Wait for it: uint8 [H, W, 3]. A decode that was not finite is done again in float32.

        Raises:
            GenerationError: the latents, or even the float32 decode, are not finite.
        """
        self._wait()
        return self._pixels.numpy() if self._is_finite else self._decode_again()


class Pipeline:
    """The models of a checkpoint on one device. Not thread-safe: one thread runs it.

    Attributes:
        card: what the checkpoint is called and was distilled for.
        device: where the models are. On CUDA step and decode only launch; mark tells the end.
        dtype: the models' dtype; latents between steps are float32.
    """

    def __init__(self, card: ModelCard, parts: ModelParts) -> None:
        self.card = replace(card, can_decode_fast=parts.fast_vae is not None)
        self.device: torch.device = parts.unet.device
        self.dtype: torch.dtype = parts.unet.dtype
        self._compiled = False
        self._text_encoder = TextEncoder(
            parts.tokenizers, parts.text_encoders, parts.zeros_for_empty, self.device
        )
        self._unet = parts.unet
        self._vae = parts.vae
        self._fast_vae = parts.fast_vae
        self._vae_scale_factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
        self._alphas_cumprod = parts.alphas_cumprod.to(self.device, torch.float32)
        self._timesteps = torch.arange(len(self._alphas_cumprod), device=self.device)

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str = "auto",
        dtype: str = "auto",
        memory: str = "auto",
        components: Path | None = None,
    ) -> Pipeline:
        """Load a model folder in diffusers' layout, strictly and straight to the device.

        Args:
            folder: holds model_index.json, unet/, vae/, both text encoders and tokenizers,
                scheduler/, and optionally dmd2.json.
            device: "auto" (CUDA where there is one), "cpu" or "cuda".
            dtype: "auto" (float16 on CUDA, float32 on CPU), or a torch dtype's name.
            memory: "full", "low" (less of the device's, slower, and with blended tiles of 512
                pixels), or "auto", which is low on a CUDA device with less than 11 GB.
            components: where the manifest's components are installed; the model's fast decoder
                is loaded too if it is there.

        Raises:
            ModelError: a file or a key is missing, unexpected or wrongly shaped, or a config
                describes a model that this sampler would run wrongly.
        """
        card, started = ModelCard.read(folder), time.perf_counter()
        place = choose_device(device)
        fast_decoder = None
        if components is not None and card.fast_decoder is not None:
            folder_of_it = components / card.fast_decoder
            fast_decoder = None if quick_problems(folder_of_it) else folder_of_it
        parts = load_parts(
            folder,
            place,
            choose_dtype(dtype, place),
            fast_decoder=fast_decoder,
            low_memory=is_low(memory, place),
        )
        pipeline = cls(card, parts)
        seconds = time.perf_counter() - started
        log.info("loaded %s on %s as %s in %.1f s", card.name, place, pipeline.dtype, seconds)
        return pipeline

    def compile(self) -> None:
        """Compile the UNet and the VAE's decoder (torch.compile) as they are called from now on.

        One image's shape is compiled for itself, and the second number of images for any number.
        Other models stay as they are.
        """
        for model in (self._unet, self._vae.decoder):
            model.to(memory_format=torch.channels_last).compile(fullgraph=True)
        self._compiled = True

    def compile_no_more(self) -> None:
        """From now on, in this process, shapes that were not compiled run as they are written."""
        if self._compiled:
            torch.compiler.set_stance("eager_on_recompile")

    @property
    def warms_up(self) -> bool:
        """Whether a shape's first calls take longer, since kernels are loaded or compiled."""
        return self._compiled or self.device.type == "cuda"

    @torch.inference_mode()
    def encode(self, requests: Sequence[GenerationRequest]) -> list[Conditioning]:
        """Embed the prompts of requests, once for all of a request's images."""
        prompts = self._text_encoder.encode([request.prompt for request in requests])
        return [self._conditioning(r, embeds) for r, embeds in zip(requests, prompts, strict=True)]

    def _conditioning(self, request: GenerationRequest, embeds: TextEmbeds) -> Conditioning:
        both = [embeds]
        if request.uses_guidance:
            both.insert(0, self._text_encoder.encode_negative(request.negative_prompt))
        time_ids = sampler.add_time_ids(request.height, request.width)[None].to(self.dtype)
        return Conditioning(
            tuple(both), sampler.to_device(time_ids, self.device), request.guidance_scale
        )

    def start(self, request: GenerationRequest, index: int, conditioning: Conditioning) -> Sample:
        """Image index of a request as pure noise, ready for its first step."""
        shape = (
            self._unet.config.in_channels,
            request.height // self._vae_scale_factor,
            request.width // self._vae_scale_factor,
        )
        trajectory = Trajectory(request.timesteps, shape, request.seeds[index], self.device)
        return Sample(trajectory, conditioning, request.fast_decode)

    @memory_errors
    @torch.inference_mode()
    def step(self, samples: Sequence[Sample]) -> None:
        """Take every image one step further with one UNet call, and do not wait for it.

        The images share a size and whether they are guided; each has its own timestep.
        """
        inputs = [(s, embeds) for s in samples for embeds in s.conditioning.embeds]
        noise_pred = self._unet(
            torch.stack([s.trajectory.latents for s, _ in inputs]).to(self.dtype),
            torch.stack([self._timesteps[s.trajectory.timestep] for s, _ in inputs]),
            encoder_hidden_states=torch.cat([embeds.prompt_embeds for _, embeds in inputs]),
            added_cond_kwargs={
                "text_embeds": torch.cat([embeds.pooled_prompt_embeds for _, embeds in inputs]),
                "time_ids": torch.cat([s.conditioning.add_time_ids for s, _ in inputs]),
            },
            return_dict=False,
        )[0]
        if len(inputs) > len(samples):
            uncond, cond = noise_pred.float().unflatten(0, (len(samples), 2)).unbind(1)
            noise_pred = torch.stack(
                [
                    sampler.guide(u, c, s.conditioning.guidance_scale)
                    for u, c, s in zip(uncond, cond, samples, strict=True)
                ]
            )
        sampler.step([s.trajectory for s in samples], noise_pred, self._alphas_cumprod)

    @memory_errors
    @torch.inference_mode()
    def decode(self, samples: Sequence[Sample]) -> list[Picture]:
        """The pictures of finished images of one size, on their way to the host."""
        if not all(sample.trajectory.done for sample in samples):
            raise GenerationError("an image was decoded before its last step")
        pictures: dict[Sample, Picture] = {}
        for vae_model, fast in ((self._vae, False), (self._fast_vae, True)):
            chosen = [sample for sample in samples if sample.fast_decode == fast]
            pictures |= zip(chosen, self._decode(vae_model, chosen), strict=True)
        return [pictures[sample] for sample in samples]

    def _decode(self, vae_model: Any, samples: Sequence[Sample]) -> list[Picture]:
        if not samples:
            return []
        latents = torch.stack([sample.trajectory.latents for sample in samples])
        pixels, is_finite = (self._to_host(t) for t in vae.decode(vae_model, latents))
        wait = self.mark()
        return [
            Picture(pixels[i], is_finite[i], wait, partial(_decode_again, vae_model, latents[i]))
            for i in range(len(samples))
        ]

    @property
    def units_ahead(self) -> int:
        """How many units of work to give the device before it has done the one in progress."""
        return 1 if self.device.type == "cuda" else 0

    def mark(self) -> Callable[[], None]:
        """A function that waits until the device has done all that it was given before."""
        if self.device.type != "cuda":
            return _nothing
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


@torch.inference_mode()
def _decode_again(vae_model: Any, latents: torch.Tensor) -> NDArray[np.uint8]:
    return vae.decode_in_float32(vae_model, latents[None])[0].cpu().numpy()


def _nothing() -> None:
    """What there is to wait for on a device that works while one waits."""
