"""All models of one checkpoint: load them, and take a batch of images one step further."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dmd2.errors import GenerationError
from dmd2.fast.compiled import compile_no_more
from dmd2.fast.runner import Runner
from dmd2.fast.ways import PLAIN
from dmd2.loras.names import MODEL_PARTS
from dmd2.model_card import ModelCard
from dmd2.models import device_work, vae
from dmd2.models.device_work import Mark
from dmd2.models.loading import ModelParts, choose_device, choose_dtype, is_low, load_parts
from dmd2.models.text_encoder import TextEmbeds, TextEncoder
from dmd2.models.weight_sets import WeightSets
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import suspecting
from dmd2.sampling import sampler
from dmd2.sampling.picture import Picture
from dmd2.sampling.room import making_room
from dmd2.sampling.sample import Conditioning, Sample, unet_call
from dmd2.sampling.sampler import Trajectory
from dmd2.store.locating import locate_safety_checker
from dmd2.store.manifest import quick_problems

log = logging.getLogger(__name__)


class Pipeline:
    """The models of a checkpoint on one device. Not thread-safe: one thread runs it.

    Attributes:
        card: what the checkpoint is called and was distilled for.
        device: where the models are. On CUDA step and decode only launch; mark tells the end.
        dtype: the models' dtype; latents between steps are float32.
        low_memory: whether they were loaded to take little of the device's memory.
        unet, vae: what calls those models, by the ways that it was given.
        weight_sets: the UNet's and the text encoders' weights with LoRAs added.
    """

    def __init__(self, card: ModelCard, parts: ModelParts) -> None:
        self.card = replace(
            card,
            can_decode_fast=parts.fast_vae is not None,
            checks_safety=parts.safety_checker is not None,
        )
        self.device: torch.device = parts.unet.device
        self.dtype: torch.dtype = parts.unet.dtype
        self.low_memory = parts.low_memory
        encoders = parts.text_encoders
        modules = dict(zip(MODEL_PARTS, (parts.unet, *encoders), strict=True))
        self.weight_sets = WeightSets(modules)
        self._text_encoder = TextEncoder(
            parts.tokenizers, encoders, parts.zeros_for_empty, self.device, self.weight_sets
        )
        self.unet = Runner("step", parts.unet, self.weight_sets.let_go)
        self.vae = Runner("decode", parts.vae, self.weight_sets.let_go)
        self._fast_vae = Runner("decode", parts.fast_vae, self.weight_sets.let_go)
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

    def end_warm_up(self) -> None:
        """From now on nothing is compiled, in this process, if compiled models are in use."""
        if self.compiles:
            compile_no_more()

    @property
    def compiles(self) -> bool:
        """Whether a shape's first call compiles, until the warm-up ends."""
        return self.unet.compiles or self.vae.compiles

    @property
    def warms_up(self) -> bool:
        """Whether a shape's first calls take longer, since kernels are loaded or compiled."""
        return self.compiles or self.device.type == "cuda"

    @making_room
    @device_work.memory_errors
    @torch.inference_mode()
    def encode(self, requests: Sequence[GenerationRequest]) -> list[Conditioning]:
        """Embed the prompts of requests of one lane, once for all of a request's images."""
        loras = requests[0].loras if requests else ()
        prompts = self._text_encoder.encode([request.prompt for request in requests], loras)
        return [self._conditioning(r, embeds) for r, embeds in zip(requests, prompts, strict=True)]

    def _conditioning(self, request: GenerationRequest, embeds: TextEmbeds) -> Conditioning:
        both = [embeds]
        if request.uses_guidance:
            negative = self._text_encoder.encode_negative(request.negative_prompt, request.loras)
            both.insert(0, negative)
        time_ids = sampler.add_time_ids(request.height, request.width)[None].to(self.dtype)
        return Conditioning(
            tuple(both), device_work.to_device(time_ids, self.device), request.guidance_scale
        )

    def start(self, request: GenerationRequest, index: int, conditioning: Conditioning) -> Sample:
        """Image index of a request as pure noise, ready for its first step."""
        shape = (
            self.unet.plain.config.in_channels,
            request.height // self._vae_scale_factor,
            request.width // self._vae_scale_factor,
        )
        trajectory = Trajectory(request.timesteps, shape, request.seeds[index], self.device)
        check = self._safety_checker is not None and not request.disable_safety_checker
        return Sample(trajectory, conditioning, request.fast_decode, check, request.loras)

    @making_room
    @device_work.memory_errors
    @torch.inference_mode()
    def step(self, samples: Sequence[Sample]) -> None:
        """Take every image one step further with one UNet call, and do not wait for it.

        The images are of one lane; each has its own timestep. With LoRAs the plain UNet is called:
        it looks up its weights at each call, and no way was judged on these.
        """
        loras = samples[0].loras
        with self.weight_sets.using("unet", loras):
            self._advance(samples, self.unet.plainly if loras else self.unet)
        for sample in samples:
            sample.ways["step"].append(PLAIN if loras else self.unet.way)

    def _advance(
        self,
        samples: Sequence[Sample],
        run: Callable[[Callable[[Any], torch.Tensor]], torch.Tensor],
    ) -> None:
        """Take images one step further by what run makes of a call of the UNet."""
        noise_pred = run(self.unet_call(samples))
        if samples[0].is_guided:
            uncond, cond = noise_pred.float().view(len(samples), 2, *noise_pred.shape[1:]).unbind(1)
            noise_pred = torch.stack(
                [
                    sampler.guide(u, c, s.conditioning.guidance_scale)
                    for u, c, s in zip(uncond, cond, samples, strict=True)
                ]
            )
        sampler.step([s.trajectory for s in samples], noise_pred, self._alphas_cumprod)

    @torch.inference_mode()
    def unet_call(self, samples: Sequence[Sample]) -> Callable[[Any], torch.Tensor]:
        """What a UNet is asked for the next step of samples, as a function of the UNet."""
        return unet_call(samples, self._timesteps, self.dtype)

    @making_room
    @device_work.memory_errors
    @torch.inference_mode()
    def decode(self, samples: Sequence[Sample]) -> list[Picture]:
        """The pictures of finished images of one size, on their way to the host."""
        if not all(sample.trajectory.done for sample in samples):
            raise GenerationError("an image was decoded before its last step")
        pictures: dict[Sample, Picture] = {}
        for decoder, fast in ((self.vae, False), (self._fast_vae, True)):
            chosen = [sample for sample in samples if sample.fast_decode == fast]
            pictures |= zip(chosen, self._decode(decoder, chosen), strict=True)
        return [pictures[sample] for sample in samples]

    def _decode(self, decoder: Runner, samples: Sequence[Sample]) -> list[Picture]:
        if not samples:
            return []
        most = vae.most_at_once(decoder.plain, *samples[0].trajectory.latents.shape[1:])
        if len(samples) > most:
            first = self._decode(decoder, samples[:most])
            return first + self._decode(decoder, samples[most:])
        latents = torch.stack([sample.trajectory.latents for sample in samples])
        pixels, is_finite = decoder(lambda model: vae.decode(model, latents))
        decoded = self.mark()
        nsfw_scores = self._nsfw_scores(pixels, any(sample.check for sample in samples))
        pixels, is_finite, nsfw_scores = map(device_work.to_host, (pixels, is_finite, nsfw_scores))
        wait = self.mark()
        for sample in samples:
            sample.ways["decode"] = [decoder.way]
        return [
            Picture(
                decoded=decoded,
                checked=sample.check,
                _pixels=pixels[index],
                _is_finite=is_finite[index],
                _nsfw_score=nsfw_scores[index],
                _wait=wait,
                _decode_again=partial(self._decode_again, sample, decoder),
            )
            for index, sample in enumerate(samples)
        ]

    def _nsfw_scores(self, pixels: torch.Tensor, check: bool) -> torch.Tensor:
        """float32 [B] for pixels uint8 [B, H, W, 3]; NaN without a check."""
        if self._safety_checker is None or not check:
            return torch.full((len(pixels),), torch.nan, device=pixels.device)
        return self._safety_checker.scores(pixels)

    @making_room
    @device_work.memory_errors
    @torch.inference_mode()
    def _decode_again(self, sample: Sample, decoder: Runner) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [H, W, 3] and their score, on the host, of one that was not finite.

        What a way made is made again by the plain models; if that is finite, the way was to blame.
        Else the decoder runs in float32.
        """
        remade = not sample.trajectory.latents.isfinite().all() and sample.took_a_way("step")
        if remade:
            self._sample_again(sample)
        pixels = None
        if remade or sample.took_a_way("decode"):
            pixels, is_finite = vae.decode(decoder.plain, sample.trajectory.latents[None])
            if not is_finite.all():
                pixels = None
            elif not remade:
                decoder.drop("returned what is not finite, where plain is")
        if pixels is None:
            with suspecting(sample.loras):
                pixels = vae.decode_in_float32(decoder.plain, sample.trajectory.latents[None])
        sample.ways["decode"] = [PLAIN]
        return pixels[0].cpu(), self._nsfw_scores(pixels, sample.check)[0].cpu()

    def _sample_again(self, sample: Sample) -> None:
        """Take all the steps of an image again, from its seed, with the plain UNet."""
        again = sample.from_start()
        while not again.trajectory.done:
            self._advance([again], self.unet.plainly)
        sample.trajectory.latents = again.trajectory.latents
        sample.ways["step"] = [PLAIN]
        if again.trajectory.latents.isfinite().all():
            self.unet.drop("returned what is not finite, where plain is")

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
