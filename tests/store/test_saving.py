"""Who may read what was saved, and what a process that may not is told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from components import write_checker
from hub_world import World
from model_folders import copy_with
from safetensors.torch import load_file
from torch import nn

from dmd2.errors import ModelError
from dmd2.sampling.pipeline import Pipeline
from dmd2.store.saving import save_weights
from training.model_folder import save_model


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode that a new file gets, under two umasks."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes_of(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_weights_have_the_umasks_mode(mode: int, tmp_path: Path) -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3).T}
    save_weights(weights, tmp_path / "x.safetensors")
    assert modes_of(tmp_path) == {mode}
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], weights["a"])


@pytest.mark.parametrize("name", ["plain", "pickled", "merged"])
def test_so_has_whatever_is_installed(name: str, mode: int, world: World) -> None:
    assert modes_of(world.install(name)) == {mode}


class Model(nn.Linear):
    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        save_weights(self.state_dict(), folder / "model.safetensors")
        (folder / "model.safetensors").chmod(0o600)
        (folder / "config.json").write_text("{}")


def test_so_has_whatever_the_trainer_saves(mode: int, tmp_path: Path) -> None:
    save_model(Model(2, 2), tmp_path / "m")
    assert modes_of(tmp_path / "m") == {mode}


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/vocab.json",
        "nsfw-checker/model.safetensors",
    ],
)
def test_a_file_that_may_not_be_read_is_called_that(
    file: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user; the tests' own may be root, who may read everything."""
    folder = copy_with(
        model_folder, tmp_path / "m", "dmd2.json", lambda card: card.pop("safety_checker")
    )
    write_checker(folder / "nsfw-checker")
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).match(file))
    with pytest.raises(ModelError, match=f"{file} may not be read by this process"):
        Pipeline.load(folder, "cpu", components=folder, check_safety=True)
