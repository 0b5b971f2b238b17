"""Weight files into models: each key exactly once, in its shape, straight to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dmd2.errors import ModelError
from dmd2.model_card import check_readable, read_json


@dataclass(frozen=True)
class Vacant:
    """A model on the meta device, and the weights that it is to get.

    Attributes:
        model: all its parameters are on the meta device.
        folder: holds stem.safetensors, or shards and their stem.safetensors.index.json.
        stem: the file's name without its ending.
        device: where the weights go.
        rename: a file's key to the model's.
    """

    model: Any
    folder: Path
    stem: str
    device: torch.device
    rename: Callable[[str], str] = str

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
                    weights[self.rename(key)] = tensors.get_tensor(key).to(dtype)
        self.model.load_state_dict(weights, strict=True, assign=True)
        return self.model.to(self.device).eval().requires_grad_(False)


def fill_all(vacant: Mapping[str, Vacant], dtype: torch.dtype) -> dict[str, Any]:
    """Fill several models at once, so that one is read while another is converted or copied."""
    with ThreadPoolExecutor() as pool:
        filling = {name: pool.submit(each.fill, dtype) for name, each in vacant.items()}
        return {name: future.result() for name, future in filling.items()}


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
