"""The demo's models as the repository ships them: one folder, from which three models are made.

The folder is the 4-step model as the container loads it. Beside it, under variants/, lies what
the other two differ in: the 1-step UNet, the teacher's UNet and the 4-step LoRA upon it; and
under loras/ a LoRA for requests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from dmd2.model_card import CARD_FILE
from dmd2.models.loading import load_parts
from dmd2.settings import ROOT
from dmd2.store.manifest import MANIFEST, RECORD_FILE, sha256_of, write_record
from dmd2.store.saving import save_weights
from training.config import DEMO, DemoConfig
from training.demo.language import known_words
from training.model_folder import write_model_folder

LICENSE = ROOT / "training" / "WEIGHTS_LICENSE"
JUDGE = ROOT / "training" / "judge.safetensors"  # what the shipped results were read with
LICENSE_NAME = "MIT: made from Microsoft's Fluent Emoji (MIT) and computed drawings alone"
ONE_STEP_UNET = "variants/1step-unet.safetensors"
TEACHER_UNET = "variants/teacher-unet.safetensors"
LORA = "variants/4step-lora.safetensors"
LORAS = "loras"
WORDS = "words.txt"
_UNET = "unet/diffusion_pytorch_model.safetensors"
CARD = {
    "name": "demo",
    "timesteps": {"4": [999, 749, 499, 249]},
    "default_size": [128, 128],
    "license": LICENSE_NAME,
    "fast_decoder": None,
    "safety_checker": None,
}


def write_bundle(
    folder: Path, teacher: Path, *, four_step: Path, one_step: Path, lora: Path, subject: Path
) -> Path:
    """Write the demo's folder in float16.

    Args:
        folder: is made; must not exist.
        teacher: the teacher's model folder.
        four_step: the 4-step student's UNet, a folder as diffusers saves it.
        one_step: the 1-step student's, likewise.
        lora: the LoRA student's file.
        subject: the file of a LoRA that requests can ask for.
    """
    parts = load_parts(teacher, torch.device("cpu"), torch.float16)
    models = {
        "text_encoder": parts.text_encoders[0],
        "text_encoder_2": parts.text_encoders[1],
        "vae": parts.vae,
        "unet": _half(four_step),
    }
    write_model_folder(folder, models, dtype=torch.float16, card=CARD)
    (folder / "variants").mkdir()
    save_weights(_half(one_step).state_dict(), folder / ONE_STEP_UNET)
    save_weights(parts.unet.state_dict(), folder / TEACHER_UNET)
    shutil.copyfile(lora, folder / LORA)
    (folder / LORAS).mkdir()
    shutil.copyfile(subject, folder / LORAS / subject.name)
    shutil.copyfile(LICENSE, folder / "LICENSE")
    (folder / WORDS).write_text("\n".join(known_words()) + "\n", encoding="utf-8")
    write_record(folder, {"model": "demo"})
    return folder


def install_bundle(folder: Path, weights_dir: Path, manifest: Path = MANIFEST) -> None:
    """Put a bundle in the place of the repository's demo, and its entries into the manifest."""
    shutil.rmtree(weights_dir / "demo", ignore_errors=True)
    shutil.copytree(folder, weights_dir / "demo")
    said = json.loads(manifest.read_text(encoding="utf-8"))
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (RECORD_FILE, CARD_FILE, "LICENSE", WORDS)
    }
    said["repositories"]["demo"] = {
        "bundled": "demo",
        "repo": "weights/demo",
        "license": LICENSE_NAME,
        "files": files,
    }
    said["models"] |= _entries(folder, files)
    manifest.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def unpack(bundle: Path, runs: Path, config: DemoConfig = DEMO, *, students: bool = True) -> None:
    """Put what a bundle has where the phases look for it, unless it is there.

    What it lacks is left for them to make.

    Args:
        bundle: as write_bundle makes it; under variants/ and loras/ it may have less.
        runs: the folder of the phases.
        config: of the bundle's making.
        students: whether to unpack more than the VAE and the teacher.

    Raises:
        ValueError: it is no bundle, or its teacher is not one of the scenes that are drawn now.
    """
    if not (bundle / TEACHER_UNET).is_file():
        raise ValueError(f"{bundle} is no bundle of the demo: it has no {TEACHER_UNET}")
    unet_config = UNet2DConditionModel.load_config(bundle / "unet")
    if tuple(unet_config["block_out_channels"]) != config.unet_channels:
        raise ValueError(
            f"{bundle} was trained on an earlier world than training/demo draws: its teacher "
            "cannot be distilled on these scenes. Train one: scripts/train demo"
        )
    parts = load_parts(bundle, torch.device("cpu"), torch.float32)
    models = {
        "text_encoder": parts.text_encoders[0],
        "text_encoder_2": parts.text_encoders[1],
        "vae": parts.vae,
        "unet": _unet_of(unet_config, bundle / TEACHER_UNET),
    }
    if not (runs / "vae" / "model").exists():
        parts.vae.save_pretrained(runs / "vae" / "model")
    if not (runs / "teacher" / "model").exists():
        write_model_folder(runs / "teacher" / "model", models)
    if not students:
        return
    if not (runs / "4step" / "unet").exists():
        parts.unet.save_pretrained(runs / "4step" / "unet")
    one_step = bundle / ONE_STEP_UNET
    if one_step.exists() and not (runs / "1step" / "unet").exists():
        _unet_of(unet_config, one_step).save_pretrained(runs / "1step" / "unet")
    files = {bundle / LORA: runs / "lora" / "lora.safetensors"}
    files |= {path: runs / "subject" / path.name for path in (bundle / LORAS).glob("*")}
    files[JUDGE] = runs / "judge" / JUDGE.name
    for path, target in files.items():
        if path.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _unet_of(config: Any, weights: Path) -> Any:
    unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(load_file(weights))
    return unet.float()


def _entries(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """The manifest's three models of the bundle."""
    beside = ("variants/", f"{LORAS}/")
    common = {path: f"demo/{path}" for path in files if not path.startswith(beside)}
    lora = {
        "from": f"demo/{TEACHER_UNET}",
        "convert": "merge-lora",
        "lora": f"demo/{LORA}",
    }
    with safe_open(folder / LORA, framework="pt") as tensors:
        num_modules = len(tensors.keys()) // 3
    return {
        "demo": {"kind": "model", "card": CARD, "files": common},
        "demo-1step": {
            "kind": "model",
            "card": {**CARD, "name": "demo-1step", "timesteps": {"1": [399]}},
            "files": {**common, _UNET: f"demo/{ONE_STEP_UNET}"},
        },
        "demo-lora": {
            "kind": "model",
            "card": {**CARD, "name": "demo-lora"},
            "lora_modules": num_modules,
            "files": {**common, _UNET: lora},
        },
    }


def _half(unet: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(unet).to(torch.float16)
