"""All models of one checkpoint: load them, and take a batch of images one step further."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, LCMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dmd2 import sampler, vae
from dmd2.errors import GenerationError, ModelError
from dmd2.model_card import ModelCard, read_json
from dmd2.request import SIDE_MULTIPLE, GenerationRequest
from dmd2.sampler import Trajectory
from dmd2.text_encoder import TextEmbeds, TextEncoder

log = logging.getLogger(__name__)

# diffusers' default where a VAE has no config: Stable Diffusion 1.5's, which washes SDXL out.
_SD15_SCALING_FACTOR = 0.18215
_SDXL_UNET_PARAMETERS = 2_000_000_000


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

    def __init__(
        self,
        card: ModelCard,
        text_encoder: TextEncoder,
        unet: Any,
        autoencoder: Any,
        alphas_cumprod: torch.Tensor,
    ) -> None:
        self.card = card
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype
        self._text_encoder = text_encoder
        self._unet = unet
        self._vae = autoencoder
        self._vae_scale_factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        self._alphas_cumprod = alphas_cumprod.to(self.device, torch.float32)

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
        place = _device(device)
        kind = _dtype(dtype, place)
        card = ModelCard.read(folder)
        index = read_json(folder / "model_index.json")
        scheduler = _load_scheduler(folder / "scheduler")
        _check_vae(folder / "vae", kind)
        started = time.perf_counter()
        models = {
            name: _load_model(model_class, folder / name, place, kind)
            for name, model_class in (
                ("text_encoder", CLIPTextModel),
                ("text_encoder_2", CLIPTextModelWithProjection),
                ("unet", UNet2DConditionModel),
                ("vae", AutoencoderKL),
            )
        }
        text_encoder = TextEncoder(
            (_load_tokenizer(folder / "tokenizer"), _load_tokenizer(folder / "tokenizer_2")),
            (models["text_encoder"], models["text_encoder_2"]),
            zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", True)),
        )
        _check_unet(models["unet"])
        seconds = time.perf_counter() - started
        log.info("loaded %s on %s as %s in %.1f s", card.name, place, kind, seconds)
        return cls(card, text_encoder, models["unet"], models["vae"], scheduler.alphas_cumprod)

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


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("DMD2_DEVICE=cuda, but torch sees no CUDA device; use cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"dtype {name!r} is not a floating-point dtype of torch")
    return dtype


def _load_tokenizer(folder: Path) -> Any:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        if not (folder / name).exists():
            raise ModelError(f"{folder / name} is missing: the model folder is incomplete")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _load_scheduler(folder: Path) -> Any:
    """An LCMScheduler with the folder's noise schedule, checked for what the sampler relies on."""
    config = read_json(folder / "scheduler_config.json")
    wanted = {
        "prediction_type": "epsilon",
        "num_train_timesteps": 1000,
        "rescale_betas_zero_snr": False,
    }
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ModelError(
                f"{folder}: {key} is {config[key]!r}; this sampler needs {value!r}, "
                "as SDXL and DMD2 were trained"
            )
    schedule = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
    return LCMScheduler(**{key: config[key] for key in schedule if key in config})


def _check_vae(folder: Path, dtype: torch.dtype) -> None:
    config = read_json(folder / "config.json")
    scaling_factor = config.get("scaling_factor")
    if scaling_factor is None or scaling_factor == _SD15_SCALING_FACTOR:
        raise ModelError(
            f"{folder}: scaling_factor is {scaling_factor}; a VAE without its own factor gets "
            "Stable Diffusion 1.5's 0.18215 and washes every image out. SDXL's is 0.13025"
        )
    if config.get("force_upcast", True) and dtype == torch.float16:
        raise ModelError(
            f"{folder}: force_upcast is set, so this VAE overflows in float16. Use "
            "madebyollin/sdxl-vae-fp16-fix, or DMD2_DTYPE=bfloat16 or float32"
        )
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ModelError(f"{folder}: {key} is set, which SDXL's latents do not have")
    factor = 2 ** (len(config.get("block_out_channels", [])) - 1)
    if SIDE_MULTIPLE % factor:
        raise ModelError(f"{folder}: its factor {factor} does not divide {SIDE_MULTIPLE} pixels")


def _check_unet(unet: Any) -> None:
    wanted = {"addition_embed_type": "text_time", "time_cond_proj_dim": None}
    for key, value in wanted.items():
        if unet.config.get(key) != value:
            raise ModelError(f"unet: {key} is {unet.config.get(key)!r}; SDXL has {value!r}")
    if unet.device.type == "cpu" and unet.num_parameters() > _SDXL_UNET_PARAMETERS:
        log.warning(
            "SDXL on the CPU takes minutes for an image of 1024x1024 and about 14 GB of memory; "
            "a CUDA GPU takes a fraction of a second"
        )


def _load_model(model_class: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """One model from its folder; every missing, unexpected or misshapen key is an error."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is missing: the model folder is incomplete")
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": str(device)},
            low_cpu_mem_usage=True,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} does not load: {error}") from error
    problems = [
        f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, keys))[:5])} ({len(keys)} in all)"
        for kind, keys in info.items()
        if keys
    ]
    if problems:
        raise ModelError(f"{folder} does not fit its config: {'; '.join(problems)}")
    return model.eval().requires_grad_(False)
