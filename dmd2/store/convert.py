"""From what was fetched to the files of a model folder: linked, or made into float16."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmd2.errors import DownloadError, LoraError
from dmd2.store.manifest import InstallFile, ManifestModel, SourceFile
from dmd2.store.saving import save_weights

if TYPE_CHECKING:
    import torch

    from dmd2.loras.delta import Deltas

Weights = Mapping[str, "torch.Tensor"]
Fetched = Mapping[SourceFile, Path]
Say = Callable[[str], None]
Added = Sequence[tuple["Deltas", float]]


def make_files(
    model: ManifestModel,
    fetched: Fetched,
    staging: Path,
    lora_scale: float,
    say: Say,
) -> None:
    """Make every file of a model folder, but for its descriptions.

    Args:
        model: what is to be made.
        fetched: where its sources lie.
        staging: the folder that is filled.
        lora_scale: the strength of the LoRA that the manifest has for it.
        say: takes warnings.

    Raises:
        DownloadError: a file is not what it should be.
        OSError: one cannot be read or written.
    """
    linked = {f: f.installed or fetched[f.source] for f in model.files if not f.is_made}
    for file, path in linked.items():
        (staging / file.target).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(path, staging / file.target)
    made = [file for file in model.files if file not in linked]
    # Tensors of safetensors are read from the disk when they are used.
    weights = {f: READERS[f.convert or ""](f, fetched, staging, say) for f in made}
    added = _loras_by_part(model, weights, fetched, lora_scale)
    for file, tensors in weights.items():
        (staging / file.target).parent.mkdir(parents=True, exist_ok=True)
        halves = _in_half(file.target, tensors, added.get(file.part, []))
        save_weights(halves, staging / file.target)


def _safetensors(file: InstallFile, fetched: Fetched, *_: object) -> Weights:
    from safetensors.torch import load_file

    return load_file(fetched[file.source])


def _pickle(file: InstallFile, fetched: Fetched, *_: object) -> Weights:
    import torch

    source = file.source
    try:
        weights: Weights = torch.load(
            fetched[source], map_location="cpu", weights_only=True, mmap=True
        )
    except pickle.UnpicklingError as error:
        raise DownloadError(
            f"{source.repo}/{source.path} is refused: it is not a pickle of tensors alone"
        ) from error
    except RuntimeError as error:
        raise DownloadError(f"{source.repo}/{source.path} cannot be read: {error}") from error
    return weights


def _checkpoint(file: InstallFile, fetched: Fetched, staging: Path, say: Say) -> Weights:
    from dmd2.store.single_file import read_single_file

    weights = read_single_file(fetched[file.source], staging, file.part)
    return _looked_at(weights, file, staging, say)


def _folder(file: InstallFile, fetched: Fetched, staging: Path, say: Say) -> Weights:
    from dmd2.store.single_file import read_folder_part

    paths = [fetched[source] for source in (file.source, *file.shards)]
    weights = read_folder_part(paths, staging, file.part)
    return _looked_at(weights, file, staging, say)


def _looked_at(weights: Weights, file: InstallFile, staging: Path, say: Say) -> Weights:
    from dmd2.store.prediction import remark_on_prediction

    if file.part == "unet" and (remark := remark_on_prediction(weights, staging / "unet")):
        say(f"warning: {file.source.path}: {remark}")
    return weights


# How the tensors of a file are read, by what the file says of its conversion.
READERS: Mapping[str, Callable[[InstallFile, Fetched, Path, Say], Weights]] = {
    "fp16": _safetensors,
    "merge-lora": _safetensors,
    "pickle": _pickle,
    "single-file": _checkpoint,
    "folder": _folder,
}


def _loras_by_part(
    model: ManifestModel, weights: Mapping[InstallFile, Weights], fetched: Fetched, scale: float
) -> dict[str, list[tuple[Deltas, float]]]:
    """What LoRAs add to the weights of each part, in the order of the sum."""
    its_own = [(file.lora, scale) for file in model.files if file.lora is not None]
    if not its_own and not model.loras:
        return {}
    from dmd2.loras.formats import read_lora
    from dmd2.loras.names import MODEL_PARTS, ModuleNames

    parts = {file.part: of_it for file, of_it in weights.items() if file.part in MODEL_PARTS}
    names = ModuleNames.of(parts)
    added: dict[str, list[tuple[Deltas, float]]] = {part: [] for part in parts}
    for source, strength in (*its_own, *model.loras):
        try:
            deltas = read_lora(fetched[source], names).deltas
        except LoraError as error:
            raise DownloadError(f"the LoRA {source.path}: {error}") from error
        num_modules = sum(map(len, deltas.values()))
        if (source, strength) in its_own and num_modules != model.lora_modules:
            raise DownloadError(
                f"the LoRA has {num_modules} modules, and must have {model.lora_modules}"
            )
        for part, of_part in deltas.items():
            added[part].append((of_part, strength))
    return added


def _in_half(target: str, weights: Weights, added: Added) -> dict[str, torch.Tensor]:
    """Weights with LoRAs, summed in float32 and rounded to float16 once, one after another."""
    from dmd2.loras.delta import merge

    halves = {}
    for name, weight in weights.items():
        of_it = [({name: deltas[name]}, scale) for deltas, scale in added if name in deltas]
        total = merge({name: weight.float()}, of_it)[name] if of_it else weight
        halves[name] = total.half()
        if not halves[name].isfinite().all():
            raise DownloadError(
                f"{name}, of {target}, is more than float16 can hold (65504), or not a number; "
                "use smaller scales, or other files"
            )
    return halves


def _link_or_copy(source: Path, target: Path) -> None:
    """Give target the content of source, at no cost where the disk has hard links.

    Disks without them say so in many ways: EPERM, ENOTSUP, ENOSYS, EACCES, EXDEV, EMLINK.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        shutil.copyfile(source, target)
