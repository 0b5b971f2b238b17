"""Weight files into models: each key exactly once, in its shape, straight to the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dmd2.errors import ModelError
from dmd2.model_card import check_readable, read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vacant:
    """A model on the meta device, and the weights that it is to get.

    Attributes:
        model: all its parameters are on the meta device.
        folder: holds stem.safetensors, or shards and their stem.safetensors.index.json; or the
            same of the variant fp16.
        stem: the file's name without its ending.
        device: where the weights go.
        rename: a file's key to the model's.
        dtype: of the weights, where it is not that of all models.
    """

    model: Any
    folder: Path
    stem: str
    device: torch.device
    rename: Callable[[str], str] = str
    dtype: torch.dtype | None = None

    def fill(self, dtype: torch.dtype) -> Any:
        """The model with its weights: each key exactly once, in its shape, for inference only."""
        files = _weight_files(self.folder, self.stem)
        wanted = {key: tuple(value.shape) for key, value in self.model.state_dict().items()}
        found = {self.rename(key): shape for file in files for key, shape in _shapes(file)}
        _check_keys(self.folder, wanted, found)
        weights = {}
        for file in files:
            with safe_open(file, framework="pt", device=str(self.device)) as tensors:
                for key in sorted(tensors.keys()):
                    weights[self.rename(key)] = tensors.get_tensor(key).to(self.dtype or dtype)
        self.model.load_state_dict(weights, strict=True, assign=True)
        return self.model.to(self.device).eval().requires_grad_(False)


def fill_all(vacant: Mapping[str, Vacant], dtype: torch.dtype) -> dict[str, Any]:
    """Fill several models at once, so that one is read while another is converted or copied."""
    with ThreadPoolExecutor() as pool:
        filling = {name: pool.submit(each.fill, dtype) for name, each in vacant.items()}
        return {name: future.result() for name, future in filling.items()}


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The folder's safetensors: one file, or the shards that its index names.

    Where there is a variant beside the weights proper, those are taken, as in stock diffusers.
    """
    variants = {
        f"{stem}.safetensors": f"{stem}.safetensors.index.json",
        f"{stem}.fp16.safetensors": f"{stem}.safetensors.index.fp16.json",
    }
    there = [
        folder / name for pair in variants.items() for name in pair if (folder / name).is_file()
    ]
    if not there:
        raise ModelError(
            f"{folder / stem}.safetensors is missing: the model folder is incomplete (pickles, and "
            "variants of the weights but fp16, are not loaded)"
        )
    if len(there) > 1:
        log.info("%s: %s is loaded, and %s is not", folder, *(path.name for path in there[:2]))
    if there[0].suffix == ".json":
        return sorted({folder / name for name in read_json(there[0])["weight_map"].values()})
    return there[:1]


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    check_readable(file)  # safetensors would say that there is no such file
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
