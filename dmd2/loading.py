"""Model folders to models: strictly, checked, and straight to the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, LCMScheduler, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from dmd2.errors import ModelError
from dmd2.model_card import read_json
from dmd2.request import SIDE_MULTIPLE

log = logging.getLogger(__name__)

# diffusers' default where a VAE has no config: Stable Diffusion 1.5's, which washes SDXL out.
_SD15_SCALING_FACTOR = 0.18215
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
        alphas_cumprod: the noise schedule, float32 [1000].
        zeros_for_empty: model_index.json's force_zeros_for_empty_prompt.
    """

    tokenizers: tuple[Any, Any]
    text_encoders: tuple[Any, Any]
    unet: Any
    vae: Any
    alphas_cumprod: torch.Tensor
    zeros_for_empty: bool


def load_parts(folder: Path, device: torch.device, dtype: torch.dtype) -> ModelParts:
    """Load every part of a model folder in diffusers' layout.

    Weights go one tensor at a time from the file to the device, so that a model is never in
    memory twice.

    Raises:
        ModelError: a file or a key is missing, unexpected or wrongly shaped, or a config
            describes a model that the sampler would run wrongly.
    """
    index = read_json(folder / "model_index.json")
    scheduler = _load_scheduler(folder / "scheduler")
    _check_vae(folder / "vae", dtype)
    return ModelParts(
        tokenizers=(_load_tokenizer(folder / "tokenizer"), _load_tokenizer(folder / "tokenizer_2")),
        text_encoders=(
            _load_text_encoder(CLIPTextModel, folder / "text_encoder", device, dtype),
            _load_text_encoder(
                CLIPTextModelWithProjection, folder / "text_encoder_2", device, dtype
            ),
        ),
        unet=_load_unet(folder / "unet", device, dtype),
        vae=_load_vae(folder / "vae", device, dtype),
        alphas_cumprod=scheduler.alphas_cumprod,
        zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", True)),
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


def _load_text_encoder(
    model_class: Any, folder: Path, device: torch.device, dtype: torch.dtype
) -> Any:
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

    return _fill(model, folder, "model", device, dtype, rename)


def _load_unet(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    config = read_json(folder / "config.json")
    for key, value in {"addition_embed_type": "text_time", "time_cond_proj_dim": None}.items():
        if config.get(key) != value:
            raise ModelError(f"{folder}: {key} is {config.get(key)!r}; SDXL has {value!r}")
    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel.from_config(config)
    _warn_of_cpu(unet, device)
    return _fill(unet, folder, "diffusion_pytorch_model", device, dtype, lambda key: key)


def _load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKL.from_config(read_json(folder / "config.json"))

    def rename(key: str) -> str:
        if ".attentions." in key:
            for old, new in _OLD_VAE_NAMES.items():
                key = key.replace(old, new)
        return key

    return _fill(vae, folder, "diffusion_pytorch_model", device, dtype, rename)


def _warn_of_cpu(unet: Any, device: torch.device) -> None:
    if device.type == "cpu" and unet.num_parameters() > _SDXL_UNET_PARAMETERS:
        log.warning(
            "SDXL on the CPU takes minutes for an image of 1024x1024 and about 14 GB of memory; "
            "a CUDA GPU takes a fraction of a second"
        )


def _fill(
    model: Any,
    folder: Path,
    stem: str,
    device: torch.device,
    dtype: torch.dtype,
    rename: Callable[[str], str],
) -> Any:
    """Give a model on the meta device its weights: each key exactly once, in its shape."""
    files = _weight_files(folder, stem)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {rename(key): shape for file in files for key, shape in _shapes(file)}
    _check_keys(folder, wanted, found)
    weights = {}
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for key in sorted(tensors.keys()):
                weights[rename(key)] = tensors.get_tensor(key).to(dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False)


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The folder's safetensors: one file, or the shards that its index names."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return sorted({folder / name for name in read_json(index)["weight_map"].values()})
    raise ModelError(
        f"{whole} is missing: the model folder is incomplete (pickles and other variants of the "
        "weights are not loaded)"
    )


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                yield key, tuple(tensors.get_slice(key).get_shape())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _check_keys(
    folder: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    problems = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "wrongly shaped": [
            f"{key} {list(found[key])} for {list(shape)}"
            for key, shape in wanted.items()
            if found.get(key, shape) != shape
        ],
    }
    said = [
        f"{len(keys)} {problem}: {', '.join(sorted(keys)[:5])}"
        for problem, keys in problems.items()
        if keys
    ]
    if said:
        raise ModelError(f"{folder} does not fit its config.json: {'; '.join(said)}")
