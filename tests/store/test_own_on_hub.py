"""The user's own checkpoint and LoRAs from a hub on loopback, with the hub's real client."""

from __future__ import annotations

import json

import pytest
import torch
from hub_world import (
    BASE_UNET,
    COMMON,
    LORA,
    TEXT_ENCODERS,
    VAE,
    VAE_WEIGHTS,
    WEIGHTS,
    Files,
    MakeWorld,
    World,
)
from local_hub import revision_of, url_path
from safetensors.torch import load, load_file, save
from single_files import single_file, with_prefix

from dmd2.errors import DownloadError
from dmd2.loras.delta import merge
from dmd2.loras.formats import read_lora
from dmd2.loras.names import ModuleNames
from dmd2.store.derived import OwnWeights, derive
from dmd2.store.install import install_model
from dmd2.store.manifest import ManifestModel

MIX, MANY, V, FOLDER = "own/mix", "own/many", "own/v", "own/folder"
UNET_16 = "unet/diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture
def own(make_world: MakeWorld, files: Files) -> World:
    """A hub that has, beside what the manifest names, repositories of other people."""
    weights = {
        "unet": load(files[BASE_UNET]),
        "text_encoder": load(files["tests/base", f"{TEXT_ENCODERS[0]}.fp16.safetensors"]),
        "text_encoder_2": load(files["tests/base", f"{TEXT_ENCODERS[1]}.fp16.safetensors"]),
    }
    weights["text_encoder"] = with_prefix(weights["text_encoder"])
    whole = {k: t.contiguous() for k, t in single_file(weights).items()}
    folder = {
        (FOLDER, path): body
        for (repo, path), body in files.items()
        if repo == "tests/base" and path != "README.md"
    }
    return make_world(
        {
            **files,
            **folder,
            (FOLDER, "folder.safetensors"): b"the same in one file",
            (MIX, "mix.safetensors"): save(whole),
            (MANY, "a.safetensors"): b"",
            (MANY, "b.safetensors"): save(whole),
            (V, "v.safetensors"): save({**whole, "v_pred": torch.ones(1)}),
        }
    )


def derived(world: World, base: str | None, *loras: str, of: str = "merged") -> ManifestModel:
    entry = world.manifest.models[of]
    own = OwnWeights(base, loras)
    return derive(entry, own, world.weights_dir, world.manifest, 1.0, world.lines.append)


@pytest.mark.parametrize(
    ("base", "sources"),
    [
        (MIX, ["mix.safetensors"]),
        (FOLDER, [UNET_16, *(f"{path}.fp16.safetensors" for path in TEXT_ENCODERS)]),
    ],
)
def test_a_checkpoint_of_a_repository_is_pinned_fetched_and_merged(
    own: World, files: Files, base: str, sources: list[str]
) -> None:
    model = derived(own, base)
    folder = install_model(model, own.weights_dir, 1.0, own.manifest, own.lines.append)
    assert own.fetched() == []
    assert f"/{base.partition('/')[2]}" in str(folder)
    unet, lora = load(files[BASE_UNET]), own.weights_dir / "lora"
    lora.write_bytes(files[LORA])
    deltas = read_lora(lora, ModuleNames.of({"unet": unet})).deltas["unet"]
    expected = {**unet, **merge(unet, [(deltas, 1.0)])}
    found = load_file(folder / "unet" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)

    recorded = json.loads((folder / "installed.json").read_text())["sources"]
    theirs = [each for each in recorded if each["repo"] == base]
    assert sorted(each["path"] for each in theirs) == sorted(sources)
    assert {each["revision"] for each in theirs} == {revision_of(base)}
    card = json.loads((folder / "dmd2.json").read_text())
    assert card["base_sha256"] == {each["path"]: each["sha256"] for each in theirs}
    assert "of-the-tests (its page on the hub)" in card["license"]


def test_a_file_and_a_revision_may_be_named(own: World) -> None:
    pinned = derived(own, f"{MIX}@{revision_of(MIX)}")
    named = derived(own, f"{MANY}/b.safetensors@main")
    assert [model.name for model in (pinned, named)] == ["mix", "b"]
    assert f"/api/models/{MIX}/revision/{revision_of(MIX)}?blobs=true" in own.hub.paths
    assert f"/api/models/{MANY}/revision/main?blobs=true" in own.hub.paths


def test_a_lora_of_a_repository_is_merged(own: World) -> None:
    model = derived(own, None, f"tests/distilled/{LORA[1]}:0.5", of="plain")
    assert model.loras[0][1] == 0.5
    folder = install_model(model, own.weights_dir, 1.0, own.manifest, own.lines.append)
    assert folder.name == "lora_fp16"
    assert len(own.hub.gets(LORA)) == 2, "its header, and then all of it"

    before = (folder / "unet" / WEIGHTS).read_bytes()
    model = derived(own, None, f"tests/distilled/{LORA[1]}:0.25", of="plain")
    install_model(model, own.weights_dir, 1.0, own.manifest, own.lines.append)
    assert (folder / "unet" / WEIGHTS).read_bytes() != before, "another scale is built anew"


def test_a_repository_with_several_files_is_refused_with_their_names(own: World) -> None:
    with pytest.raises(DownloadError, match=r"has a.safetensors, b.safetensors: name one file"):
        derived(own, MANY)
    with pytest.raises(DownloadError, match=r"no such file; there are a.safetensors, b.safe"):
        derived(own, f"{MANY}/c.safetensors")
    with pytest.raises(DownloadError, match=r"own/none .main. could not be read.*HF_TOKEN"):
        derived(own, "own/none")


def test_a_header_is_looked_at_before_anything_is_fetched(own: World) -> None:
    with pytest.raises(DownloadError, match=r"v.safetensors is refused.*v_pred"):
        derived(own, V)
    (asked,) = own.hub.gets((V, "v.safetensors"))
    assert asked.range == "bytes=0-100000"
    assert own.hub.paths - {url_path(V, "v.safetensors")} == {
        f"/api/models/{V}/revision/main?blobs=true"
    }


def test_what_came_is_what_the_hub_said(own: World) -> None:
    model = derived(own, MIX)
    own.hub.flip_byte((MIX, "mix.safetensors"))
    with pytest.raises(DownloadError, match=r"has sha256 .*The same command goes on"):
        install_model(model, own.weights_dir, 1.0, own.manifest, own.lines.append)
    assert {path.name for path in own.weights_dir.iterdir()} == {".downloads", ".lock"}


def test_configs_of_a_repository_are_looked_at(make_world: MakeWorld, files: Files) -> None:
    scheduler = json.loads(files["tests/base", "scheduler/scheduler_config.json"])
    theirs = {(FOLDER, path): files["tests/base", path] for path in COMMON}
    theirs[FOLDER, UNET_16] = files[BASE_UNET]
    theirs[FOLDER, "scheduler/scheduler_config.json"] = json.dumps(
        {**scheduler, "prediction_type": "v_prediction"}
    ).encode()
    world = make_world({**files, **theirs})
    with pytest.raises(DownloadError, match="own/folder is refused: its scheduler says v_pred"):
        derived(world, FOLDER)
    assert not any(VAE in path or UNET_16 in path for path in world.hub.paths)


def test_installed_models_are_not_fetched_again(own: World, files: Files) -> None:
    """Of what the model needs beside the user's checkpoint, all but DMD2's LoRA is there."""
    own.install("plain")
    model = derived(own, MIX)
    own.hub.requests.clear()
    folder = install_model(model, own.weights_dir, 1.0, own.manifest, own.lines.append)
    assert own.hub.paths == {url_path(MIX, "mix.safetensors"), url_path(*LORA)}
    for path in (f"vae/{WEIGHTS}", "vae/config.json", "tokenizer_2/merges.txt", "model_index.json"):
        assert (folder / path).read_bytes() == (own.weights_dir / "plain" / path).read_bytes()

    # What is damaged is not taken, but fetched.
    vae = own.weights_dir / "plain" / "vae" / WEIGHTS
    body = bytearray(vae.read_bytes())
    body[-1] ^= 1
    vae.unlink()
    vae.write_bytes(body)
    assert VAE_WEIGHTS in [(s.repo, s.path) for s in derived(own, MIX).needed if s.local is None]
