"""Disks that are too small, or fill up: found early, and nothing half-done is left."""

from __future__ import annotations

import errno
import shutil
from types import SimpleNamespace

import pytest
from hub_world import (
    UNET,
    Files,
    World,
    raising,
)
from safetensors import SafetensorError

from dmd2.store.install import _DISK_MARGIN


def needed_space(world: World, name: str) -> int:
    """Free bytes that a first installation asks for."""
    model = world.manifest.models[name]
    converted = sum(file.source.size for file in model.files if file.convert)
    return model.download_size + converted + _DISK_MARGIN


@pytest.mark.parametrize("name", ["plain", "pickled", "merged"])
def test_a_disk_that_is_too_small_is_found_before_any_request(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    needed = needed_space(world, name)
    give_disk(needed - 1, monkeypatch)
    text = world.fail(name)
    assert "free, and 0.1 GB are needed" in text
    assert "DMD2_WEIGHTS_DIR" in text
    assert world.hub.requests == []
    give_disk(needed, monkeypatch)
    world.install(name)


def give_disk(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with so many bytes free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_only_what_this_model_has_fetched_needs_no_space(
    world: World, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = world.weights_dir / ".downloads" / "of" / "another model"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(1000))
    give_disk(needed_space(world, "plain") - 1, monkeypatch)
    world.fail()
    assert world.hub.requests == []

    give_disk(10**9, monkeypatch)
    world.hub.remove(UNET)
    world.fail()
    world.hub.repair()
    fetched = sum(path.stat().st_size for path in world.fetched() if path != other)
    give_disk(needed_space(world, "plain") - fetched, monkeypatch)
    world.install()


FULL = OSError(errno.ENOSPC, "No space left on device")
FULL_IN_SAFETENSORS = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("huggingface_hub.file_download.http_get", FULL),
        ("os.link", FULL),
        ("safetensors.torch.save_file", FULL),
        ("safetensors.torch.save_file", FULL_IN_SAFETENSORS),
        ("pathlib.Path.rename", FULL),
    ],
)
def test_a_disk_that_fills_up_midway_leaves_nothing_half_done(
    world: World, monkeypatch: pytest.MonkeyPatch, function: str, error: Exception
) -> None:
    with monkeypatch.context() as full:
        full.setattr(function, raising(error))
        text = world.fail()
    assert "the disk is full. Free some space, or set DMD2_WEIGHTS_DIR" in text
    world.install()
    assert world.problems() == []


def test_another_failure_to_write_is_told_as_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = SafetensorError("I/O error: Input/output error (os error 5)")
    monkeypatch.setattr("safetensors.torch.save_file", raising(error))
    assert "Input/output error" in world.fail()
