"""A model of the manifest with the user's own weights in it, as another entry to install."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dmd2.errors import DownloadError
from dmd2.loras.names import MODEL_PARTS
from dmd2.loras.sources import SUFFIX
from dmd2.model_card import read_json
from dmd2.request.lora_rules import MAX_LORA_SCALE, MIN_LORA_SCALE
from dmd2.store.manifest import (
    RECORD_FILE,
    InstallFile,
    Manifest,
    ManifestModel,
    SourceFile,
    quick_problems,
    sha256_of,
)
from dmd2.store.own_files import BaseFiles, find_base, find_lora

# What people run DMD2's LoRA in on checkpoints that it was not trained with, beside its 4 steps:
# LCMScheduler's own choice of 8 of the 1000 timesteps.
COMMUNITY_STEPS = {"8": [999, 874, 749, 624, 499, 374, 249, 124]}
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class OwnWeights:
    """What a user adds to a model of the manifest, as find_base and find_lora take it.

    Attributes:
        base: the checkpoint that DMD2's LoRA is merged into; None for the manifest's own.
        loras: LoRAs that are merged in beside it, each as FILE or FILE:SCALE.
        name: of the new model; None for that of the file.
    """

    base: str | None = None
    loras: tuple[str, ...] = ()
    name: str | None = None


def derive(
    entry: ManifestModel,
    own: OwnWeights,
    weights_dir: Path,
    manifest: Manifest,
    lora_scale: float,
    say: Callable[[str], None],
) -> ManifestModel:
    """An entry with the user's own weights, ready to be installed under another name.

    Args:
        entry: of the manifest.
        own: what takes the place of its weights, or is added to them.
        weights_dir: where models are installed.
        manifest: the names that are taken, and what installed models have that can be used again.
        lora_scale: the strength that the entry's own LoRA will be merged at.
        say: takes warnings.

    Raises:
        DownloadError: something of it is not there, or cannot be used, or the name is taken.
    """
    if own.base is not None and not entry.lora_modules:
        fitting = ", ".join(model.name for model in manifest.models.values() if model.lora_modules)
        raise DownloadError(
            f"--base: {entry.name} is a whole UNet, which takes no other base; {fitting} can"
        )
    if entry.card is None:
        raise DownloadError(f"{entry.name} is a {entry.kind}, which takes no weights of yours")
    scaled = [_with_scale(text) for text in own.loras]
    base = None if own.base is None else find_base(own.base, say)
    loras = [(find_lora(text), scale) for text, scale in scaled]
    name = own.name or _plain_name(base.name if base else loras[0][0].path)
    _check_name(name, manifest)
    _check_each_once(entry, loras)
    files = [_with_own(file, base, bool(loras)) for file in entry.files]
    hashes = {
        "base_sha256": None if base is None else base.sha256,
        "lora_sha256": _hashes(entry, loras, lora_scale),
    }
    model = replace(
        entry,
        name=name,
        files=tuple(_from_installed(file, weights_dir, manifest) for file in files),
        loras=tuple(loras),
        own={"of": entry.name, **hashes},
    )
    card = {**entry.card, "name": name, "license": _licenses(entry, base, loras)}
    card |= {key: value for key, value in hashes.items() if value}
    if base is not None:
        say(
            f"the VAE of {base.name} is left out: {entry.name}'s, which is safe in float16, is used"
        )
        card |= {"community_steps": COMMUNITY_STEPS}
        card |= {"default_steps": max(int(count) for count in entry.card["timesteps"])}
    model = replace(model, card=card)
    _check_place(model, weights_dir / name)
    return model


def _with_scale(text: str) -> tuple[str, float]:
    """FILE:SCALE taken apart; a file may have a colon in its name."""
    file, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        scale = float(number)
    except ValueError:
        return text, 1.0
    if not MIN_LORA_SCALE <= scale <= MAX_LORA_SCALE or scale == 0:
        raise DownloadError(
            f"--lora {text}: a scale of {scale:g} is not from {MIN_LORA_SCALE:g} to "
            f"{MAX_LORA_SCALE:g}, or is 0 and does nothing"
        )
    return file, scale


def _plain_name(path: str) -> str:
    stem = path.rpartition("/")[2].removesuffix(SUFFIX)
    return re.sub(r"[^\w.+-]+", "_", stem, flags=re.ASCII).strip("_.-+")[:100]


def _check_name(name: str, manifest: Manifest) -> None:
    if name in manifest.models:
        raise DownloadError(f"{name!r} is the manifest's own name; give another one with --name")
    if not _NAME.fullmatch(name):
        raise DownloadError(
            f"{name!r} is no name for a model: letters, digits and . _ + - are, at most 100, the "
            "first of them a letter or a digit; give one with --name"
        )


def _check_each_once(entry: ManifestModel, loras: Sequence[tuple[SourceFile, float]]) -> None:
    seen = {file.lora.sha256 for file in entry.files if file.lora is not None}
    for source, _ in loras:
        if source.sha256 in seen:
            raise DownloadError(
                f"--lora {source.path} is merged in already; give each once, with one scale"
            )
        seen.add(source.sha256)


def _check_place(model: ManifestModel, folder: Path) -> None:
    """Replace nothing but the same model of the same files."""
    if not folder.exists():
        return
    record = read_json(folder / RECORD_FILE) if (folder / RECORD_FILE).is_file() else {}
    if record.get("own", {}) == {} or _sources(record["own"]) != _sources(model.own or {}):
        raise DownloadError(
            f"{folder} is there already, and was made of something else; give another name with "
            "--name, or delete it"
        )


def _sources(own: Any) -> tuple[Any, ...]:
    return own.get("of"), own.get("base_sha256"), list(own.get("lora_sha256") or ())


def _with_own(file: InstallFile, base: BaseFiles | None, has_loras: bool) -> InstallFile:
    """A file of a part that LoRAs can change, made of the user's base and open to LoRAs."""
    if file.part not in MODEL_PARTS or not file.target.endswith(SUFFIX):
        return file
    if base is not None:
        source, *shards = base.parts[file.part]
        size, convert = file.source.size, base.convert
        return replace(file, source=source, shards=tuple(shards), size=size, convert=convert)
    return replace(file, convert=file.convert or "fp16") if has_loras else file


def _from_installed(file: InstallFile, weights_dir: Path, manifest: Manifest) -> InstallFile:
    """A file that need not be fetched where another installed model has it, and whole."""
    for other in manifest.models.values():
        folder = weights_dir / other.name
        same = [each for each in other.files if each.source == file.source and each.lora is None]
        if not same or quick_problems(folder):
            continue
        recorded = read_json(folder / RECORD_FILE)["files"]
        for each in same:
            path = folder / each.target
            if recorded.get(each.target, {}).get("sha256") != sha256_of(path):
                continue
            if each.convert is None:
                return replace(file, source=replace(file.source, local=path))
            if (each.convert, each.target) == (file.convert, file.target):
                return replace(file, installed=path)
    return file


def _hashes(
    entry: ManifestModel, loras: Sequence[tuple[SourceFile, float]], lora_scale: float
) -> dict[str, float]:
    """The scale of each LoRA that is merged in, by its sha256, in the order of the sum."""
    its_own = [(file.lora, lora_scale) for file in entry.files if file.lora is not None]
    return {str(source.sha256): scale for source, scale in (*its_own, *loras)}


def _licenses(
    entry: ManifestModel, base: BaseFiles | None, loras: Sequence[tuple[SourceFile, float]]
) -> str:
    sources = [of_part[0] for of_part in base.parts.values()] if base else []
    sources += [source for source, _ in loras]
    said = dict.fromkeys(f"{source.path}: {source.license}" for source in sources)
    return "; ".join([str((entry.card or {}).get("license", "")), *said])
