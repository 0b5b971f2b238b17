"""Installing models with the hub's real client, from a hub on loopback."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hub_world import (
    BASE,
    BASE_UNET,
    CARD,
    COMMON,
    LICENSES,
    LORA,
    MODEL_FILES,
    PICKLE,
    RECORD,
    TEXT_ENCODERS,
    UNET,
    VAE,
    VAE_WEIGHTS,
    WEIGHTS,
    Files,
    World,
    card_of,
    half,
    raising,
)
from local_hub import Key, url_path
from safetensors.torch import load, load_file

from dmd2.errors import DownloadError
from dmd2.sampling.pipeline import Pipeline
from dmd2.store.manifest import sha256_of


@pytest.mark.parametrize("name", ["plain", "pickled", "merged"])
def test_an_installed_model_is_whole_and_loads(world: World, files: Files, name: str) -> None:
    folder = world.install(name)

    assert folder == world.weights_dir / name
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == MODEL_FILES | {CARD, RECORD}
    scale = {"lora_scale": 1.0} if name == "merged" else {}
    assert json.loads((folder / CARD).read_text()) == {**card_of(name), **scale}
    assert world.problems(name) == []
    assert world.fetched() == []
    for path in COMMON:
        assert (folder / path).read_bytes() == files[BASE, path]
    for path in TEXT_ENCODERS:
        fetched = files[BASE, f"{path}.fp16.safetensors"]
        assert (folder / f"{path}.safetensors").read_bytes() == fetched
    assert_same(load_file(folder / "vae" / WEIGHTS), half(load(files[VAE_WEIGHTS])))

    pipeline = Pipeline.load(folder, "cpu")
    assert (pipeline.card.name, pipeline.card.default_steps) == (name, 2)


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same tensors, bit for bit and in the same dtypes."""
    assert found.keys() == expected.keys()
    different = [key for key in expected if found[key].dtype != expected[key].dtype]
    different += [key for key in expected if not torch.equal(found[key], expected[key])]
    assert different == []


def test_a_unet_is_taken_as_it_is(world: World, files: Files) -> None:
    assert (world.install("plain") / "unet" / WEIGHTS).read_bytes() == files[UNET]


def test_two_installations_at_once_fetch_once(world: World, files: Files) -> None:
    with ThreadPoolExecutor(2) as processes:
        folders = list(processes.map(lambda _: world.install("plain"), range(2)))
    assert folders[0] == folders[1]
    assert len(world.hub.gets(UNET)) == 1
    assert world.problems() == []


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS, errno.EACCES])
def test_a_disk_without_hard_links_gets_copies(
    error: int, world: World, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", raising(OSError(error, os.strerror(error))))
    assert (world.install("plain") / "unet" / WEIGHTS).read_bytes() == files[UNET]
    assert world.problems() == []


def test_a_pickle_becomes_float16_safetensors(world: World, files: Files) -> None:
    installed = load_file(world.install("pickled") / "unet" / WEIGHTS)
    source = torch.load(io.BytesIO(files[PICKLE]), weights_only=True)
    assert {tensor.dtype for tensor in source.values()} == {torch.float32}
    assert_same(installed, half(source))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_lora_is_merged_by_its_formula(world: World, files: Files, scale: float) -> None:
    installed = load_file(world.install("merged", lora_scale=scale) / "unet" / WEIGHTS)
    weights, lora = load(files[BASE_UNET]), load(files[LORA])
    kernels = set()
    for key, weight in weights.items():
        module = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        expected = weight.double()
        if f"{module}.alpha" in lora:
            down, up = (lora[f"{module}.lora_{part}.weight"].double() for part in ("down", "up"))
            delta = torch.einsum("or,ri...->oi...", up.flatten(1), down)
            expected = expected + scale * (lora[f"{module}.alpha"].item() / len(down)) * delta
            kernels.add(tuple(down.shape[2:]))
        # float16 keeps 11 bits, so half a unit in the last place is 2**-11 of the value.
        torch.testing.assert_close(
            installed[key].double(), expected, rtol=2**-11 + 1e-5, atol=2**-24
        )
        assert torch.equal(installed[key], weight) == (f"{module}.alpha" not in lora)
    assert kernels == {(), (1, 1), (3, 3)}
    assert {tensor.dtype for tensor in installed.values()} == {torch.float16}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_lora_is_merged_as_diffusers_fuses_it(
    world: World, files: Files, tmp_path: Path, scale: float
) -> None:
    folder = world.install("merged", lora_scale=scale)
    (tmp_path / "lora.safetensors").write_bytes(files[LORA])
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.unet.load_state_dict(load(files[BASE_UNET]))

    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()

    fused, installed = pipe.unet.state_dict(), load_file(folder / "unet" / WEIGHTS)
    assert fused.keys() == installed.keys()
    for key in fused:
        torch.testing.assert_close(installed[key].float(), fused[key], rtol=2**-10, atol=1e-6)


def test_another_lora_scale_is_built_anew(world: World) -> None:
    folder = world.install("merged")
    full = sha256_of(folder / "unet" / WEIGHTS)
    world.install("merged", lora_scale=0.5)
    assert sha256_of(folder / "unet" / WEIGHTS) != full
    assert json.loads((folder / CARD).read_text())["lora_scale"] == 0.5
    assert world.problems("merged") == []
    world.install("merged", lora_scale=1.0)
    assert sha256_of(folder / "unet" / WEIGHTS) == full


@pytest.mark.parametrize(("name", "scale"), [("plain", 0.5), ("merged", 1.0)])
def test_a_second_installation_does_nothing(world: World, name: str, scale: float) -> None:
    """The scale of a model without a LoRA makes no difference."""
    folder = world.install(name)
    world.hub.requests.clear()
    world.lines.clear()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    assert world.install(name, lora_scale=scale) == folder

    assert world.hub.requests == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert len(world.lines) == 1
    assert "nothing to do" in world.lines[0]


def test_a_part_gets_its_files_and_its_config(world: World, files: Files) -> None:
    folder = world.install("part")
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, "config.json", RECORD}
    assert (folder / WEIGHTS).read_bytes() == files[VAE_WEIGHTS]
    assert json.loads((folder / "config.json").read_text()) == {"_class_name": "AutoencoderTiny"}
    assert world.problems("part") == []


@pytest.mark.parametrize(
    ("name", "unet"), [("plain", [UNET]), ("pickled", [PICKLE]), ("merged", [BASE_UNET, LORA])]
)
def test_only_what_is_needed_is_asked_for_and_once(
    world: World, name: str, unet: list[Key]
) -> None:
    world.install(name)
    needed = [(BASE, path) for path in COMMON]
    needed += [(BASE, f"{path}.fp16.safetensors") for path in TEXT_ENCODERS]
    needed += [(VAE, "config.json"), VAE_WEIGHTS, *unet]
    assert world.hub.paths == {url_path(*key) for key in needed}
    assert {key: len(world.hub.gets(key)) for key in needed} == dict.fromkeys(needed, 1)


def test_every_licence_is_said_before_anything_is_fetched(world: World) -> None:
    world.hub.remove((BASE, "model_index.json"))
    world.fail("plain")
    said = [line.strip() for line in world.lines if "licence of" in line]
    assert sorted(said) == sorted(f"licence of {repo}: {name}" for repo, name in LICENSES.items())
    size = sum(source.size for source in world.manifest.models["plain"].sources)
    assert world.lines[0] == f"plain: 18 files, {size / 1e6:.1f} MB to fetch"


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.1, float("nan")])
def test_a_lora_scale_out_of_range_is_refused(world: World, scale: float) -> None:
    with pytest.raises(DownloadError, match="above 0 and at most 2"):
        world.install("merged", lora_scale=scale)
    assert world.hub.requests == []


def test_an_unknown_entry_is_refused_with_the_known_ones(world: World) -> None:
    with pytest.raises(DownloadError, match="'sdxl' is not one of plain, pickled, merged, part"):
        world.install("sdxl")
