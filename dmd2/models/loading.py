"""Model folders to models: strictly, checked, and straight to the device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, LCMScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from dmd2.errors import ModelError
from dmd2.model_card import check_readable, read_json
from dmd2.models.safety import SafetyChecker
from dmd2.models.strict_weights import Vacant, fill_all
from dmd2.request.size import SIDE_MULTIPLE

log = logging.getLogger(__name__)

# diffusers' default where a VAE has no config: Stable Diffusion 1.5's, which washes SDXL out.
_SD15_SCALING_FACTOR = 0.18215
_DIFFUSERS_STEM = "diffusion_pytorch_model"
_TILE_SIDE = 512
# With all models on it and one image of 1024x1024 under way, SDXL is said to take 9 GB.
_ENOUGH_MEMORY = 11e9
_SDXL_UNET_PARAMETERS = 2_000_000_000
# What diffusers called the parts of a VAE's attention before 0.18; many files still do.
_OLD_VAE_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


@dataclass(frozen=True)
class ModelParts:
    """The loaded parts of a model folder.

    Attributes:
        tokenizers: tokenizer and tokenizer_2.
        text_encoders: text_encoder and text_encoder_2.
        unet, vae: diffusers' UNet2DConditionModel and AutoencoderKL.
        fast_vae: an AutoencoderTiny for the same latents; None where there is none.
        safety_checker: None where images are not classified.
        alphas_cumprod: the noise schedule, float32 [1000].
        zeros_for_empty: model_index.json's force_zeros_for_empty_prompt.
        low_memory: whether they were loaded to take little of the device's memory.
    """

    tokenizers: tuple[Any, Any]
    text_encoders: tuple[Any, Any]
    unet: Any
    vae: Any
    alphas_cumprod: torch.Tensor
    zeros_for_empty: bool
    fast_vae: Any = None
    safety_checker: SafetyChecker | None = None
    low_memory: bool = False


def load_parts(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fast_decoder: Path | None = None,
    safety_checker: Path | None = None,
    low_memory: bool = False,
) -> ModelParts:
    """Load every part of a model folder in diffusers' layout, and components beside it.

    With low_memory the text encoders stay in the host's memory, and the VAE decodes in tiles of
    512x512 pixels, whose seams are blended.

    Weights go one tensor at a time from the file to the device, so that a model is never in
    memory twice.

    Raises:
        ModelError: a file or a key is missing, unexpected or wrongly shaped, or a config
            describes a model that the sampler would run wrongly.
    """
    index = read_json(folder / "model_index.json")
    scheduler = _load_scheduler(folder / "scheduler")
    _check_vae(folder / "vae")
    encoder_device = torch.device("cpu") if low_memory else device
    first, second = folder / "text_encoder", folder / "text_encoder_2"
    vacant = {
        "unet": _vacant_unet(folder / "unet", device),
        "text_encoder_2": _vacant_encoder(CLIPTextModelWithProjection, second, encoder_device),
        "text_encoder": _vacant_encoder(CLIPTextModel, first, encoder_device),
        "vae": _vacant_vae(folder / "vae", device, dtype, in_tiles=low_memory),
    }
    if fast_decoder is not None:
        vacant["fast_vae"] = _vacant_fast_vae(fast_decoder, device)
    models = fill_all(vacant, dtype)
    return ModelParts(
        tokenizers=(_load_tokenizer(folder / "tokenizer"), _load_tokenizer(folder / "tokenizer_2")),
        text_encoders=(models["text_encoder"], models["text_encoder_2"]),
        unet=models["unet"],
        vae=models["vae"],
        alphas_cumprod=scheduler.alphas_cumprod,
        zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", True)),
        fast_vae=models.get("fast_vae"),
        safety_checker=(
            None if safety_checker is None else SafetyChecker.load(safety_checker, device, dtype)
        ),
        low_memory=low_memory,
    )


def choose_device(name: str) -> torch.device:
    """The device that DMD2_DEVICE means; ModelError where there is no CUDA for "cuda"."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("DMD2_DEVICE=cuda, but torch sees no CUDA device; use cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that DMD2_DTYPE means: "auto" is float16 on CUDA and float32 elsewhere."""
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"dtype {name!r} is not a floating-point dtype of torch")
    return dtype


def is_low(memory: str, device: torch.device) -> bool:
    """What DMD2_MEMORY means: "auto" is low on a CUDA device with less than 11 GB."""
    if memory == "auto" and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory < _ENOUGH_MEMORY
    return memory == "low"


def _load_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer in either form: vocab.json and merges.txt, or tokenizer.json."""
    whole = (folder / "tokenizer.json").exists()
    for name in ("tokenizer.json",) if whole else ("vocab.json", "merges.txt"):
        _check_there(folder / name)
    _check_there(folder / "tokenizer_config.json")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _check_there(path: Path) -> None:
    if not path.exists():
        raise ModelError(f"{path} is missing: the model folder is incomplete")
    check_readable(path)


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


def _check_vae(folder: Path) -> None:
    config = read_json(folder / "config.json")
    scaling_factor = config.get("scaling_factor")
    if scaling_factor is None or scaling_factor == _SD15_SCALING_FACTOR:
        raise ModelError(
            f"{folder}: scaling_factor is {scaling_factor}; a VAE without its own factor gets "
            "Stable Diffusion 1.5's 0.18215 and washes every image out. SDXL's is 0.13025"
        )
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ModelError(f"{folder}: {key} is set, which SDXL's latents do not have")
    factor = 2 ** (len(config.get("block_out_channels", [])) - 1)
    if SIDE_MULTIPLE % factor:
        raise ModelError(f"{folder}: its factor {factor} does not divide {SIDE_MULTIPLE} pixels")


def _vacant_encoder(model_class: Any, folder: Path, device: torch.device) -> Vacant:
    read_json(folder / "config.json")
    with init_empty_weights(include_buffers=False):
        model = model_class(CLIPTextConfig.from_pretrained(folder, local_files_only=True))
    # SDXL's files say text_model.*; transformers has put that prefix in and out of its classes.
    wanted = set(model.state_dict())
    prefix = "text_model."

    def rename(key: str) -> str:
        if key in wanted:
            return key
        return key.removeprefix(prefix) if key.startswith(prefix) else prefix + key

    return Vacant(model, folder, "model", device, rename)


def _vacant_unet(folder: Path, device: torch.device) -> Vacant:
    config = read_json(folder / "config.json")
    for key, value in {"addition_embed_type": "text_time", "time_cond_proj_dim": None}.items():
        if config.get(key) != value:
            raise ModelError(f"{folder}: {key} is {config.get(key)!r}; SDXL has {value!r}")
    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel.from_config(config)
    _warn_of_cpu(unet, device)
    return Vacant(unet, folder, _DIFFUSERS_STEM, device)


def _vacant_vae(folder: Path, device: torch.device, dtype: torch.dtype, in_tiles: bool) -> Vacant:
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKL.from_config(read_json(folder / "config.json"))
    if in_tiles:
        vae.enable_tiling()
        # By default a tile is as large as the pictures of the VAE's training: 1024 for SDXL's.
        vae.tile_sample_min_size = _TILE_SIDE
        vae.tile_latent_min_size = _TILE_SIDE // 2 ** (len(vae.config.block_out_channels) - 1)

    def rename(key: str) -> str:
        if ".attentions." in key:
            for old, new in _OLD_VAE_NAMES.items():
                key = key.replace(old, new)
        return key

    own_dtype = None
    if vae.config.force_upcast and dtype == torch.float16:
        own_dtype = torch.float32
        log.info(
            "%s: force_upcast is set, since this VAE overflows in float16: it decodes in float32, "
            "as in stock diffusers; madebyollin/sdxl-vae-fp16-fix, which need not, is faster",
            folder,
        )
    return Vacant(vae, folder, _DIFFUSERS_STEM, device, rename, own_dtype)


def _vacant_fast_vae(folder: Path, device: torch.device) -> Vacant:
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderTiny.from_config(read_json(folder / "config.json"))
    return Vacant(vae, folder, _DIFFUSERS_STEM, device)


def _warn_of_cpu(unet: Any, device: torch.device) -> None:
    if device.type == "cpu" and unet.num_parameters() > _SDXL_UNET_PARAMETERS:
        log.warning(
            "SDXL on the CPU takes minutes for an image of 1024x1024 and about 14 GB of memory; "
            "a CUDA GPU takes a fraction of a second"
        )
