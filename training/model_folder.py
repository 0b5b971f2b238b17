"""Writing a model folder in diffusers' layout, as DESIGN.md's promise 2 has it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from transformers.utils.logging import disable_progress_bar

from dmd2.model_card import CARD_FILE, read_json
from dmd2.settings import ROOT
from dmd2.store.manifest import RECORD_FILE
from dmd2.store.saving import open_to_others

TOKENIZER_FILES = ROOT / "weights" / "tokenizer"


def write_model_folder(
    folder: Path,
    models: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write models as a complete folder with SDXL's noise schedule and tokenizers.

    Args:
        folder: is made; must not exist.
        models: "unet", "vae", "text_encoder" and "text_encoder_2". A dtype other than float32
            is cast to in place.
        dtype: of the stored weights.
        card: the content of dmd2.json; None writes none.
    """
    folder.mkdir(parents=True)
    disable_progress_bar()
    for name, model in models.items():
        save_model(model if dtype == torch.float32 else model.to(dtype), folder / name)
    noise_schedule().save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>")
    write_tokenizer(folder / "tokenizer_2", pad_token="!")
    _write_json(folder / "model_index.json", _MODEL_INDEX)
    if card is not None:
        _write_json(folder / CARD_FILE, card)
    return folder


def write_student_folder(folder: Path, teacher: Path, unet: Any, card: Mapping[str, Any]) -> Path:
    """Write a teacher's model folder with another UNet, in float16, and a card.

    Args:
        folder: is made; must not exist.
        teacher: the model folder that all but the UNet and the card is copied from.
        unet: is cast to float16 in place.
        card: the content of dmd2.json.
    """
    not_copied = shutil.ignore_patterns("unet", CARD_FILE, RECORD_FILE)
    shutil.copytree(teacher, folder, ignore=not_copied)
    save_model(unet.to(torch.float16), folder / "unet")
    _write_json(folder / CARD_FILE, card)
    return folder


def save_model(model: Any, folder: Path) -> None:
    """Save one model, without the path that it was once loaded from."""
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        open_to_others(weights)
    config = read_json(folder / "config.json")
    config.pop("_name_or_path", None)
    _write_json(folder / "config.json", config)


def noise_schedule() -> EulerDiscreteScheduler:
    """SDXL's scheduler, whose alphas_cumprod [1000] are those of training."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def write_tokenizer(folder: Path, *, pad_token: str) -> None:
    """SDXL's tokenizer: CLIP's vocabulary, and the padding that tells the two apart."""
    folder.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(TOKENIZER_FILES / name, folder / name)
    start = {
        "content": "<|startoftext|>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
    end = {**start, "content": "<|endoftext|>"}
    special = {"bos_token": start, "eos_token": end, "pad_token": pad_token, "unk_token": end}
    _write_json(folder / "special_tokens_map.json", special)
    typed = {
        key: {"__type": "AddedToken", **value} if isinstance(value, dict) else value
        for key, value in special.items()
    }
    config = {
        **typed,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", dict(sorted(config.items())))


_MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0.dev0",
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
