"""All models of one checkpoint: load them, and take a batch of images one step further."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dmd2 import sampler, vae
from dmd2.errors import GenerationError
from dmd2.loading import ModelParts, choose_device, choose_dtype, load_parts
from dmd2.model_card import ModelCard
from dmd2.request import GenerationRequest
from dmd2.sampler import Trajectory
from dmd2.text_encoder import TextEmbeds, TextEncoder

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


@dataclass(frozen=True)
class Sample:
    """One image under way."""

    trajectory: Trajectory
    conditioning: Conditioning


class Pipeline:
    """The models of a checkpoint on one device. Not thread-safe: one thread runs it.

    Attributes:
        card: what the checkpoint is called and was distilled for.
        device: where the models are.
        dtype: the models' dtype; latents between steps are float32.
    """

    def __init__(self, card: ModelCard, parts: ModelParts) -> None:
        self.card = card
        self.device: torch.device = parts.unet.device
        self.dtype: torch.dtype = parts.unet.dtype
        self._text_encoder = TextEncoder(
            parts.tokenizers, parts.text_encoders, parts.zeros_for_empty
        )
        self._unet = parts.unet
        self._vae = parts.vae
        self._vae_scale_factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
        self._alphas_cumprod = parts.alphas_cumprod.to(self.device, torch.float32)

    @classmethod
    def load(cls, folder: Path, device: str = "auto", dtype: str = "auto") -> Pipeline:
        """Load a model folder in diffusers' layout, strictly and straight to the device.

        Args:
            folder: holds model_index.json, unet/, vae/, both text encoders and tokenizers,
                scheduler/, and optionally dmd2.json.
            device: "auto" (CUDA where there is one), "cpu" or "cuda".
            dtype: "auto" (float16 on CUDA, float32 on CPU), or a torch dtype's name.

        Raises:
            ModelError: a file or a key is missing, unexpected or wrongly shaped, or a config
                describes a model that this sampler would run wrongly.
        """
        card, started = ModelCard.read(folder), time.perf_counter()
        place = choose_device(device)
        parts = load_parts(folder, place, choose_dtype(dtype, place))
        pipeline = cls(card, parts)
        seconds = time.perf_counter() - started
        log.info("loaded %s on %s as %s in %.1f s", card.name, place, pipeline.dtype, seconds)
        return pipeline

    @torch.inference_mode()
    def encode(self, request: GenerationRequest) -> Conditioning:
        """Embed a request's prompts, once for all of its images."""
        embeds = [self._text_encoder.encode(request.prompt)]
        if request.uses_guidance:
            embeds.insert(0, self._text_encoder.encode_negative(request.negative_prompt))
        time_ids = sampler.add_time_ids(request.height, request.width)[None]
        return Conditioning(
            tuple(embeds), time_ids.to(self.device, self.dtype), request.guidance_scale
        )

    def start(self, request: GenerationRequest, index: int, conditioning: Conditioning) -> Sample:
        """Image index of a request as pure noise, ready for its first step."""
        shape = (
            self._unet.config.in_channels,
            request.height // self._vae_scale_factor,
            request.width // self._vae_scale_factor,
        )
        trajectory = Trajectory(request.timesteps, shape, request.seeds[index], self.device)
        return Sample(trajectory, conditioning)

    @torch.inference_mode()
    def step(self, samples: Sequence[Sample]) -> None:
        """Take every image one step further with one UNet call.

        The images share a size and whether they are guided; each has its own timestep.
        """
        guided = len(samples[0].conditioning.embeds) == 2
        inputs = [(s, embeds) for s in samples for embeds in s.conditioning.embeds]
        noise_pred = self._unet(
            torch.stack([s.trajectory.latents for s, _ in inputs]).to(self.dtype),
            torch.tensor([s.trajectory.timestep for s, _ in inputs], device=self.device),
            encoder_hidden_states=torch.cat([embeds.prompt_embeds for _, embeds in inputs]),
            added_cond_kwargs={
                "text_embeds": torch.cat([embeds.pooled_prompt_embeds for _, embeds in inputs]),
                "time_ids": torch.cat([s.conditioning.add_time_ids for s, _ in inputs]),
            },
            return_dict=False,
        )[0]
        for index, sample in enumerate(samples):
            eps = noise_pred[index]
            if guided:
                uncond, cond = noise_pred[2 * index], noise_pred[2 * index + 1]
                eps = sampler.guide(
                    uncond.float(), cond.float(), sample.conditioning.guidance_scale
                )
            sample.trajectory.advance(eps, self._alphas_cumprod)

    @torch.inference_mode()
    def decode(self, sample: Sample) -> NDArray[np.uint8]:
        """The picture of a finished image, uint8 [H, W, 3]."""
        if not sample.trajectory.done:
            raise GenerationError("an image was decoded before its last step")
        return vae.decode(self._vae, sample.trajectory.latents).cpu().numpy()

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
