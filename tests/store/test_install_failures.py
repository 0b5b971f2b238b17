"""Installations that fail: nothing half-done is left, and the error says what to do."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_world import (
    BASE,
    CHUNK,
    LORA,
    PICKLE,
    RECORD,
    UNET,
    VAE_WEIGHTS,
    WEIGHTS,
    Files,
    MakeWorld,
    World,
    pickled,
    raising,
)
from local_hub import Key, url_path
from safetensors.torch import load, save

from dmd2.errors import DownloadError
from dmd2.store.manifest import sha256_of


def test_a_cut_connection_is_taken_up_by_the_client(world: World, files: Files) -> None:
    world.hub.cut(UNET, 2 * CHUNK, times=1)
    folder = world.install()
    assert [get.range for get in world.hub.gets(UNET)] == [None, f"bytes={2 * CHUNK}-"]
    assert (folder / "unet" / WEIGHTS).read_bytes() == files[UNET]


def test_an_interrupted_transfer_is_taken_up_by_the_next_installation(
    world: World, files: Files
) -> None:
    world.hub.cut(UNET, 2 * CHUNK, times=6)
    assert f"{UNET[0]}/{UNET[1]} was not fetched" in world.fail()
    assert world.hub.gets(UNET)[-1].range == f"bytes={2 * CHUNK}-"
    assert len(world.hub.gets(UNET)) == 6
    world.hub.requests.clear()

    folder = world.install()

    assert [get.range for get in world.hub.gets(UNET)] == [f"bytes={2 * CHUNK}-"]
    assert world.hub.paths == {url_path(*UNET)}
    assert (folder / "unet" / WEIGHTS).read_bytes() == files[UNET]
    assert world.problems() == []
    assert world.fetched() == []


def test_a_redirect_to_another_host_is_followed_and_gets_no_token(
    world: World, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub sends large files from elsewhere; an interrupted one goes on there too."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    world.hub.redirect()
    world.hub.cut(UNET, 2 * CHUNK, times=6)
    world.fail()
    world.install()
    assert (world.weights_dir / "plain" / "unet" / WEIGHTS).read_bytes() == files[UNET]
    assert world.hub.gets(UNET)[-1].range == f"bytes={2 * CHUNK}-"
    assert world.hub.tokens == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


@pytest.mark.parametrize("key", [UNET, VAE_WEIGHTS, (BASE, "tokenizer/merges.txt")])
def test_a_flipped_byte_is_found_and_its_copy_deleted(world: World, key: Key) -> None:
    world.hub.flip_byte(key)
    text = world.fail()
    assert f"{key[0]}/{key[1]} has sha256 " in text
    assert world.hub.etag(key) in text
    assert "that copy was deleted" in text
    assert key[1].rpartition("/")[2] not in {path.name for path in world.fetched()}

    world.hub.repair()
    world.install()
    assert [get.range for get in world.hub.gets(key)] == [None, None]
    assert world.problems() == []


@pytest.mark.parametrize("extra", [-100, 100])
def test_a_wrong_size_is_found_and_its_copy_deleted(world: World, files: Files, extra: int) -> None:
    size = len(files[UNET])
    world.hub.serve_instead(UNET, (files[UNET] + bytes(100))[: size + extra])
    text = world.fail()
    assert f"{UNET[1]} has {size + extra} bytes, and the manifest says {size}" in text
    assert "that copy was deleted" in text

    world.hub.repair()
    world.install()
    assert world.hub.gets(UNET)[-1].range is None
    assert world.problems() == []


def test_a_short_file_of_an_estimated_size_is_found_by_its_hash(world: World, files: Files) -> None:
    world.hub.serve_instead(PICKLE, files[PICKLE][:-100])
    assert f"{PICKLE[1]} has sha256" in world.fail("pickled")


def test_a_missing_file_is_named(world: World) -> None:
    world.hub.remove(UNET)
    text = world.fail()
    assert f"{UNET[0]}/{UNET[1]} was not fetched" in text
    assert "Entry Not Found" in text


def test_another_revision_is_fetched_from_its_start_and_named_where_it_is_gone(
    world: World,
) -> None:
    world.hub.cut(UNET, 2 * CHUNK, times=6)
    world.fail()
    plain = world.manifest.models["plain"]
    unet = dataclasses.replace(plain.files[-1].source, revision="0" * 40)
    changed = (*plain.files[:-1], dataclasses.replace(plain.files[-1], source=unet))
    models = {"plain": dataclasses.replace(plain, files=changed)}
    world.manifest = dataclasses.replace(world.manifest, models=models)
    assert "Revision Not Found" in world.fail()
    assert world.hub.requests[-1].path == f"/{UNET[0]}/resolve/{'0' * 40}/{UNET[1]}"
    assert world.hub.requests[-1].range is None


def test_damage_to_what_is_kept_for_the_next_installation_is_found(world: World) -> None:
    world.hub.cut(UNET, 2 * CHUNK, times=6)
    world.fail()
    (part,) = (path for path in world.fetched() if path.name == UNET[1])
    part.write_bytes(b"\0" + part.read_bytes()[1:])
    assert "has sha256" in world.fail()
    world.install()
    assert world.problems() == []


def test_a_damaged_copy_of_full_length_is_found(world: World, files: Files) -> None:
    world.hub.cut(UNET, 2 * CHUNK, times=6)
    world.fail()
    (part,) = (path for path in world.fetched() if path.name == UNET[1])
    part.write_bytes(bytes(len(files[UNET])))
    assert "damaged, and was deleted" in world.fail()
    world.install()
    assert world.problems() == []


def test_an_interrupt_leaves_nothing_half_done(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        world.install()
    assert {path.name for path in world.weights_dir.iterdir()} == {".downloads", ".lock"}


@pytest.mark.parametrize("extra", [b"", b"of another size"])
def test_a_refused_file_is_named(make_world: MakeWorld, files: Files, extra: bytes) -> None:
    broken = files[LORA][:-1] + b"!" + extra
    reason = "the first LoRA, which its author replaced"
    world = make_world(files, refused={hashlib.sha256(broken).hexdigest(): reason})
    world.hub.serve_instead(LORA, broken)
    assert f"{LORA[0]}/{LORA[1]} is refused: {reason}; that copy was deleted" in world.fail(
        "merged"
    )


class _Code:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._path),)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    make_world: MakeWorld, files: Files, tmp_path: Path
) -> None:
    trace = tmp_path / "the code ran"
    body = pickled({"conv_in.weight": torch.zeros(1), "more": _Code(trace)})
    torch.load(io.BytesIO(body), weights_only=False)
    assert trace.is_dir()  # so this pickle does run its code where it is let
    trace.rmdir()

    text = make_world({**files, PICKLE: body}).fail("pickled")

    assert f"{PICKLE[0]}/{PICKLE[1]} is refused: it is not a pickle of tensors alone" in text
    assert not trace.exists()


def test_a_pickle_of_an_old_kind_is_not_installed(make_world: MakeWorld, files: Files) -> None:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, file, _use_new_zipfile_serialization=False)
    world = make_world({**files, PICKLE: file.getvalue()})
    assert f"{PICKLE[1]} cannot be read" in world.fail("pickled")


def test_a_lora_of_another_model_is_not_installed(make_world: MakeWorld, files: Files) -> None:
    lora = {key.replace("mid_block", "middle_block"): t for key, t in load(files[LORA]).items()}
    world = make_world({**files, LORA: save(lora)})
    text = world.fail("merged")
    assert "unknown keys ('lora_unet_middle_block" in text
    assert "no module of SDXL" in text


def test_a_lora_with_another_number_of_modules_is_not_installed(world: World) -> None:
    models = dict(world.manifest.models)
    models["merged"] = dataclasses.replace(models["merged"], lora_modules=1)
    world.manifest = dataclasses.replace(world.manifest, models=models)
    assert "modules, and must have 1" in world.fail("merged")


def test_a_good_installation_survives_a_failed_one(world: World) -> None:
    folder = world.install("merged")
    before = {path: sha256_of(path) for path in folder.rglob("*") if path.is_file()}
    world.hub.flip_byte(LORA)
    with pytest.raises(DownloadError, match="has sha256"):
        world.install("merged", lora_scale=0.5)
    assert {path: sha256_of(path) for path in folder.rglob("*") if path.is_file()} == before
    assert world.problems("merged") == []
    assert {path.name for path in world.weights_dir.iterdir()} == {"merged", ".downloads", ".lock"}


def test_what_a_killed_installation_left_is_not_taken_over(world: World) -> None:
    left = world.weights_dir / ".installing-plain" / "unet" / "more.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of it")
    folder = world.install()
    assert not (folder / "unet" / "more.safetensors").exists()
    assert [path.name for path in world.weights_dir.glob(".installing-*")] == []


@pytest.mark.parametrize("damaged", [f"unet/{WEIGHTS}", RECORD])
def test_a_damaged_installation_is_made_anew(world: World, damaged: str) -> None:
    path = world.install() / damaged
    path.write_bytes(path.read_bytes()[:-100])
    world.install()
    assert world.problems() == []
