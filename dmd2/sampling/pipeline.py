"""All models of one checkpoint: load them, and take a batch of images one step further."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dmd2.errors import GenerationError
from dmd2.model_card import ModelCard
from dmd2.models import device_work, vae
from dmd2.models.device_work import Mark
from dmd2.models.loading import ModelParts, choose_device, choose_dtype, is_low, load_parts
from dmd2.models.text_encoder import TextEmbeds, TextEncoder
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling import sampler
from dmd2.sampling.picture import Picture
from dmd2.sampling.sampler import Trajectory
from dmd2.store.manifest import locate_safety_checker, quick_problems

log = logging.getLogger(__name__)


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
    """One image under way.

    Attributes:
        fast_decode: chooses what makes its pixels.
        check: whether the safety checker, where there is one, classifies them.
    """

    trajectory: Trajectory
    conditioning: Conditioning
    fast_decode: bool
    check: bool


class Pipeline:
    """The models of a checkpoint on one device. Not thread-safe: one thread runs it.

    Attributes:
        card: what the checkpoint is called and was distilled for.
        device: where the models are. On CUDA step and decode only launch; mark tells the end.
        dtype: the models' dtype; latents between steps are float32.
    """

    def __init__(self, card: ModelCard, parts: ModelParts) -> None:
        self.card = replace(
            card,
            can_decode_fast=parts.fast_vae is not None,
            checks_safety=parts.safety_checker is not None,
        )
        self.device: torch.device = parts.unet.device
        self.dtype: torch.dtype = parts.unet.dtype
        self._compiled = False
        self._text_encoder = TextEncoder(
            parts.tokenizers, parts.text_encoders, parts.zeros_for_empty, self.device
        )
        self._unet = parts.unet
        self._vae = parts.vae
        self._fast_vae = parts.fast_vae
        self._safety_checker = parts.safety_checker
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
        check_safety: bool = False,
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
            check_safety: whether to load the model's safety checker, which then must be there.

        Raises:
            MissingWeightsError: the safety checker is not installed.
            ModelError: a file or a key is missing, unexpected or wrongly shaped, or a config
                describes a model that this sampler would run wrongly.
        """
        card, started = ModelCard.read(folder), time.perf_counter()
        place = choose_device(device)
        fast_decoder = safety_checker = None
        if components is not None and card.fast_decoder is not None:
            folder_of_it = components / card.fast_decoder
            fast_decoder = None if quick_problems(folder_of_it) else folder_of_it
        if components is not None and check_safety:
            safety_checker = locate_safety_checker(card, components)
        parts = load_parts(
            folder,
            place,
            choose_dtype(dtype, place),
            fast_decoder=fast_decoder,
            safety_checker=safety_checker,
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

    @device_work.memory_errors
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
            tuple(both), device_work.to_device(time_ids, self.device), request.guidance_scale
        )

    def start(self, request: GenerationRequest, index: int, conditioning: Conditioning) -> Sample:
        """Image index of a request as pure noise, ready for its first step."""
        shape = (
            self._unet.config.in_channels,
            request.height // self._vae_scale_factor,
            request.width // self._vae_scale_factor,
        )
        trajectory = Trajectory(request.timesteps, shape, request.seeds[index], self.device)
        check = self._safety_checker is not None and not request.disable_safety_checker
        return Sample(trajectory, conditioning, request.fast_decode, check)

    @device_work.memory_errors
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

    @device_work.memory_errors
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
        most = vae.most_at_once(vae_model, *samples[0].trajectory.latents.shape[1:])
        if len(samples) > most:
            first = self._decode(vae_model, samples[:most])
            return first + self._decode(vae_model, samples[most:])
        latents = torch.stack([sample.trajectory.latents for sample in samples])
        pixels, is_finite = vae.decode(vae_model, latents)
        decoded = self.mark()
        nsfw_scores = self._nsfw_scores(pixels, any(sample.check for sample in samples))
        pixels, is_finite, nsfw_scores = map(device_work.to_host, (pixels, is_finite, nsfw_scores))
        wait = self.mark()
        return [
            Picture(
                decoded=decoded,
                checked=sample.check,
                _pixels=pixels[index],
                _is_finite=is_finite[index],
                _nsfw_score=nsfw_scores[index],
                _wait=wait,
                _decode_again=partial(self._decode_again, vae_model, latents[index], sample.check),
            )
            for index, sample in enumerate(samples)
        ]

    def _nsfw_scores(self, pixels: torch.Tensor, check: bool) -> torch.Tensor:
        """float32 [B] for pixels uint8 [B, H, W, 3]; NaN without a check."""
        if self._safety_checker is None or not check:
            return torch.full((len(pixels),), torch.nan, device=pixels.device)
        return self._safety_checker.scores(pixels)

    @device_work.memory_errors
    @torch.inference_mode()
    def _decode_again(
        self, vae_model: Any, latents: torch.Tensor, check: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [H, W, 3] and their score, on the host, by a decoder in float32."""
        pixels = vae.decode_in_float32(vae_model, latents[None])
        return pixels[0].cpu(), self._nsfw_scores(pixels, check)[0].cpu()

    @property
    def units_ahead(self) -> int:
        """How many units of work to give the device before it has done the one in progress."""
        return 1 if self.device.type == "cuda" else 0

    def mark(self) -> Mark:
        """A mark behind all that the device was given so far."""
        return device_work.mark(self.device)

    def is_broken(self) -> bool:
        """Whether the device refuses all further work, as CUDA does after some errors."""
        return device_work.is_broken(self.device)
