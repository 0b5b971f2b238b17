"""Installing models with the hub's real client, from a hub on loopback that also fails."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import constants, file_download
from huggingface_hub.utils import close_session
from local_hub import Key, LocalHub, revision_of, url_path
from random_model import SDXL_UNET, TOKENIZER_FILES, write_random_model, write_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from dmd2 import download
from dmd2.download import install
from dmd2.errors import DownloadError, MissingWeightsError, ModelError
from dmd2.pipeline import Pipeline
from dmd2.weights import Manifest, locate, sha256_of, verify, write_record

Files = dict[Key, bytes]

BASE, VAE, DISTILLED = "tests/base", "tests/vae", "tests/distilled"
LICENSES = {BASE: "a licence", VAE: "another licence", DISTILLED: "non-commercial"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
BASE_UNET: Key = (BASE, "unet/diffusion_pytorch_model.fp16.safetensors")
VAE_WEIGHTS: Key = (VAE, WEIGHTS)
UNET: Key = (DISTILLED, "unet_fp16.safetensors")
PICKLE: Key = (DISTILLED, "unet_fp16.bin")
LORA: Key = (DISTILLED, "lora_fp16.safetensors")
CHUNK = 65536
RECORD, CARD = "installed.json", "dmd2.json"

COMMON = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    *(
        f"{folder}/{file}"
        for folder in ("tokenizer", "tokenizer_2")
        for file in ("merges.txt", "vocab.json", "special_tokens_map.json", "tokenizer_config.json")
    ),
    "unet/config.json",
}
TEXT_ENCODERS = ("text_encoder/model", "text_encoder_2/model")
MODEL_FILES = COMMON | {
    *(f"{path}.safetensors" for path in TEXT_ENCODERS),
    "vae/config.json",
    f"vae/{WEIGHTS}",
    f"unet/{WEIGHTS}",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A tiny model as the hub has SDXL and DMD2: float16, but for the VAE and the pickle."""
    folder = write_random_model(tmp_path_factory.mktemp("source") / "tiny")
    unet = load_file(folder / "unet" / WEIGHTS)
    return {
        **{(BASE, path): (folder / path).read_bytes() for path in COMMON},
        **{
            (BASE, f"{path}.fp16.safetensors"): save(
                half(load_file(folder / f"{path}.safetensors")), {"format": "pt"}
            )
            for path in TEXT_ENCODERS
        },
        (BASE, "README.md"): b"A file that no model needs.",
        BASE_UNET: save(half(unet), {"format": "pt"}),
        (VAE, "config.json"): (folder / "vae" / "config.json").read_bytes(),
        VAE_WEIGHTS: (folder / "vae" / WEIGHTS).read_bytes(),
        UNET: save(half({key: tensor / 3 for key, tensor in unet.items()}), {"format": "pt"}),
        PICKLE: pickled({key: tensor / 7 for key, tensor in unet.items()}),
        LORA: save(kohya_lora(unet)),
    }


def half(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights in float16."""
    return {key: tensor.half() for key, tensor in weights.items()}


def pickled(content: object) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def kohya_lora(unet: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA on what DMD2's own reaches: every matrix and convolution of the blocks.

    The attention's modules share rank and alpha, since diffusers 0.42 knows no other there.
    """
    generator = torch.Generator().manual_seed(5)
    lora = {}
    for index, key in enumerate(sorted(unet)):
        shape = unet[key].shape
        if not key.startswith(("down_", "mid_", "up_")) or len(shape) < 2:
            continue
        module = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        rank, alpha = (4, 2.0) if ".attn" in key else (2 + index % 3, 1.0 + index % 4)
        down = torch.randn(rank, *shape[1:], generator=generator) / 8
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator) / 8
        lora[f"{module}.lora_down.weight"], lora[f"{module}.lora_up.weight"] = down, up
        lora[f"{module}.alpha"] = torch.tensor(alpha)
    return half(lora)


def manifest_of(files: Files, refused: Mapping[str, str]) -> dict[str, Any]:
    """weights/manifest.json for the tiny hub: three models that differ in the UNet, and a part."""
    unet = f"unet/{WEIGHTS}"
    common = {
        **{path: f"base/{path}" for path in sorted(COMMON)},
        **{f"{path}.safetensors": f"base/{path}.fp16.safetensors" for path in TEXT_ENCODERS},
        "vae/config.json": "vae/config.json",
        f"vae/{WEIGHTS}": {"from": f"vae/{WEIGHTS}", "convert": "fp16"},
    }
    unets: dict[str, Any] = {
        "plain": f"distilled/{UNET[1]}",
        "pickled": {"from": f"distilled/{PICKLE[1]}", "convert": "pickle"},
        "merged": {
            "from": f"base/{BASE_UNET[1]}",
            "convert": "merge-lora",
            "lora": f"distilled/{LORA[1]}",
        },
    }
    models: dict[str, Any] = {
        name: {"kind": "model", "card": card_of(name), "files": {**common, unet: made_of}}
        for name, made_of in unets.items()
    }
    models["merged"]["lora_modules"] = len(load(files[LORA])) // 3
    models["part"] = {
        "kind": "component",
        "files": {WEIGHTS: f"vae/{WEIGHTS}"},
        "generated": {"config.json": {"_class_name": "AutoencoderTiny"}},
    }
    repositories = {
        repo.removeprefix("tests/"): {
            "repo": repo,
            "revision": revision_of(repo),
            "license": license_name,
            "files": {
                path: facts_of((repo, path), body)
                for (owner_name, path), body in files.items()
                if owner_name == repo
            },
        }
        for repo, license_name in LICENSES.items()
    }
    return {"repositories": repositories, "refused": refused, "models": models}


def card_of(name: str) -> dict[str, Any]:
    """A model's dmd2.json."""
    return {"name": name, "timesteps": {"2": [999, 499]}, "default_size": [64, 64], "license": "x"}


def facts_of(key: Key, body: bytes) -> dict[str, Any]:
    """A file's entry of the manifest; the pickle's size is an estimate."""
    size = {"estimated_size": 1_000_000} if key == PICKLE else {"size": len(body)}
    return {**size, "sha256": hashlib.sha256(body).hexdigest()}


@dataclasses.dataclass
class World:
    """A hub, the manifest that describes it, and where its models are installed."""

    hub: LocalHub
    manifest: Manifest
    weights_dir: Path
    lines: list[str] = dataclasses.field(default_factory=list)

    def install(self, name: str = "plain", *, lora_scale: float = 1.0) -> Path:
        """Install an entry, keeping the lines of progress."""
        return install(
            name,
            self.weights_dir,
            lora_scale=lora_scale,
            manifest=self.manifest,
            say=self.lines.append,
        )

    def fail(self, name: str = "plain") -> str:
        """The text of an installation that fails, with nothing of it left but fetched files."""
        with pytest.raises(DownloadError) as caught:
            self.install(name)
        assert {path.name for path in self.weights_dir.iterdir()} <= {".downloads"}
        text = str(caught.value)
        assert text.startswith(f"{name} was not installed: ")
        assert f"`scripts/download-weights {name}`" in text
        return text

    def problems(self, name: str = "plain") -> list[str]:
        """What is wrong with an installed entry."""
        return verify(self.manifest.models[name], self.weights_dir / name)

    def fetched(self) -> list[Path]:
        """The files, whole or in part, that an installation left for the next."""
        return [path for path in self.weights_dir.glob(".downloads/**/*") if path.is_file()]


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    """Makes the one world of a test from the hub's files, with the client pointed at its hub."""
    hubs = []

    def make(files: Files, refused: Mapping[str, str] | None = None) -> World:
        hub = LocalHub(files).__enter__()
        hubs.append(hub)
        point_client_at(hub.url, monkeypatch)
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps(manifest_of(files, refused or {})))
        (tmp_path / "weights").mkdir()
        return World(hub, Manifest.read(path), tmp_path / "weights")

    yield make
    close_session()
    for hub in hubs:
        hub.__exit__()


def point_client_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, for another hub and without waits, telemetry or a proxy."""
    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def world(make_world: MakeWorld, files: Files) -> World:
    return make_world(files)


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


def test_an_unknown_entry_is_refused_with_the_known_ones(world: World) -> None:
    with pytest.raises(DownloadError, match="'sdxl' is not one of plain, pickled, merged, part"):
        world.install("sdxl")


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


def needed_space(world: World, name: str) -> int:
    """Free bytes that a first installation asks for."""
    model = world.manifest.models[name]
    converted = sum(file.source.size for file in model.files if file.convert)
    return model.download_size + converted + download._DISK_MARGIN


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


def raising(error: BaseException) -> Callable[..., None]:
    """A function that only raises."""

    def function(*_: object, **__: object) -> None:
        raise error

    return function


def test_another_failure_to_write_is_told_as_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = SafetensorError("I/O error: Input/output error (os error 5)")
    monkeypatch.setattr("safetensors.torch.save_file", raising(error))
    assert "Input/output error" in world.fail()


def test_an_interrupt_leaves_nothing_half_done(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        world.install()
    assert [path.name for path in world.weights_dir.iterdir()] == [".downloads"]


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
    assert "the UNet has no lora_unet_middle_block" in world.fail("merged")


def test_a_good_installation_survives_a_failed_one(world: World) -> None:
    folder = world.install("merged")
    before = {path: sha256_of(path) for path in folder.rglob("*") if path.is_file()}
    world.hub.flip_byte(LORA)
    with pytest.raises(DownloadError, match="has sha256"):
        world.install("merged", lora_scale=0.5)
    assert {path: sha256_of(path) for path in folder.rglob("*") if path.is_file()} == before
    assert world.problems("merged") == []
    assert {path.name for path in world.weights_dir.iterdir()} == {"merged", ".downloads"}


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


@pytest.mark.parametrize(
    "target", ["text_encoder/model.safetensors", f"vae/{WEIGHTS}", "tokenizer/vocab.json", CARD]
)
def test_verify_finds_a_flipped_byte(world: World, target: str) -> None:
    path = world.install() / target
    good = sha256_of(path)
    flip_byte(path)
    assert world.problems() == [f"{target} has sha256 {sha256_of(path)}, not {good}"]


def flip_byte(path: Path) -> None:
    """Invert a file's middle byte."""
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 0xFF
    path.write_bytes(body)


@pytest.mark.parametrize("target", [f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "model_index.json"])
def test_verify_finds_a_truncated_file(world: World, target: str) -> None:
    path = world.install() / target
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert world.problems() == [f"{target} has {size - 1} bytes, not {size}"]


@pytest.mark.parametrize("target", [f"unet/{WEIGHTS}", "tokenizer_2/merges.txt", CARD])
def test_verify_finds_a_missing_file(world: World, target: str) -> None:
    (world.install() / target).unlink()
    assert world.problems() == [f"{target} is missing"]


def test_verify_asks_the_manifest_and_not_only_the_record(world: World) -> None:
    folder = world.install()
    flip_byte(folder / "unet" / WEIGHTS)
    (folder / CARD).unlink()
    (folder / RECORD).unlink()
    write_record(folder, {})
    problems = world.problems()
    assert len(problems) == 2
    assert problems[0] == f"{CARD} is not in the record"
    assert problems[1].startswith(f"unet/{WEIGHTS} has sha256 ")


def test_verify_finds_a_folder_that_was_not_installed(world: World) -> None:
    assert world.problems() == ["there is no such folder"]
    (world.weights_dir / "plain").mkdir()
    assert world.problems() == ["it has no installed.json, so it was not installed whole"]


@pytest.mark.parametrize("name", ["plain", "merged"])
def test_locate_says_how_to_install_missing_weights(world: World, name: str) -> None:
    size = sum(source.size for source in world.manifest.models[name].sources)
    with pytest.raises(MissingWeightsError) as caught:
        locate(name, world.weights_dir, world.manifest)
    assert f"`scripts/download-weights {name}` (about {size / 1e6:.1f} MB" in str(caught.value)
    assert "DMD2_DOWNLOAD=1" in str(caught.value)


def test_locate_finds_what_is_installed_until_it_is_damaged(world: World) -> None:
    folder = world.install()
    assert locate("plain", world.weights_dir, world.manifest) == folder
    os.truncate(folder / "unet" / WEIGHTS, 5)
    with pytest.raises(MissingWeightsError, match=f"unet/{WEIGHTS} has 5 bytes"):
        locate("plain", world.weights_dir, world.manifest)
    os.truncate(folder / RECORD, 5)
    with pytest.raises(MissingWeightsError, match=f"{RECORD} is damaged"):
        locate("plain", world.weights_dir, world.manifest)


def test_locate_refuses_a_part(world: World) -> None:
    world.install("part")
    with pytest.raises(ModelError, match="'part' is a component, which cannot run alone") as caught:
        locate("part", world.weights_dir, world.manifest)
    assert not isinstance(caught.value, MissingWeightsError)


def test_locate_takes_a_path_of_a_model_folder(world: World, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert locate(str(tmp_path), world.weights_dir, world.manifest) == tmp_path


def test_locate_lists_the_entries_for_an_unknown_name(world: World) -> None:
    with pytest.raises(ModelError, match=r"\(plain, pickled, merged, part\)") as caught:
        locate("sdxl", world.weights_dir, world.manifest)
    assert not isinstance(caught.value, MissingWeightsError)


@pytest.fixture(scope="module")
def real() -> Manifest:
    """weights/manifest.json."""
    return Manifest.read()


def test_the_real_manifest_pins_every_file(real: Manifest) -> None:
    sources = [source for model in real.models.values() for source in model.sources]
    assert all(is_hex(source.revision, 40) for source in sources)
    # An installation accepts nothing whose hash is not recorded.
    assert all(is_hex(str(source.sha256), 64) for source in sources)
    assert all(is_hex(sha256, 64) for sha256 in real.refused)
    assert not {source.sha256 for source in sources} & set(real.refused)
    assert all(source.size > 0 and source.license for source in sources)


def is_hex(text: str, digits: int) -> bool:
    """Whether text is so many lower-case hexadecimal digits."""
    return len(text) == digits and set(text) <= set("0123456789abcdef")


def test_the_real_manifest_s_models_are_complete(real: Manifest) -> None:
    models = [model for model in real.models.values() if model.kind == "model"]
    assert [model.name for model in models] == ["sdxl-4step", "sdxl-4step-lora", "sdxl-1step"]
    for model in models:
        assert {file.target for file in model.files} == MODEL_FILES
        assert model.card is not None
        assert model.card["name"] == model.name
        # What is taken as it is must be float16 already; DMD2 has no fp16 in its VAE's name.
        (vae,) = (file for file in model.files if file.target == f"vae/{WEIGHTS}")
        assert (vae.source.repo, vae.convert) == ("madebyollin/sdxl-vae-fp16-fix", "fp16")


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_the_real_tokenizers_are_the_ones_that_are_kept_here(real: Manifest, name: str) -> None:
    targets = {file.target: file.source for file in real.models["sdxl-4step"].files}
    for file in ("vocab.json", "merges.txt"):
        source = targets[f"{name}/{file}"]
        assert source.sha256 == sha256_of(TOKENIZER_FILES / file)
        assert source.size == (TOKENIZER_FILES / file).stat().st_size


@pytest.mark.parametrize(
    ("name", "pad_token"), [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")]
)
def test_a_random_model_s_tokenizers_are_the_real_ones(
    real: Manifest, tmp_path: Path, name: str, pad_token: str
) -> None:
    write_tokenizer(tmp_path / name, pad_token=pad_token)
    targets = {file.target: file.source for file in real.models["sdxl-4step"].files}
    for file in ("special_tokens_map.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        assert sha256_of(tmp_path / name / file) == targets[f"{name}/{file}"].sha256


def test_the_real_sizes(real: Manifest) -> None:
    models = real.models
    assert models["sdxl-4step"].download_size == pytest.approx(7.1e9, rel=0.01)
    assert models["sdxl-1step"].download_size == pytest.approx(7.1e9, rel=0.01)
    assert models["sdxl-4step-lora"].download_size == pytest.approx(7.5e9, rel=0.01)
    assert models["taesdxl"].download_size == 9793292


def test_the_real_lora_reaches_every_matrix_and_convolution_of_sdxl_s_blocks(
    real: Manifest,
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time",
            use_linear_projection=True,
            **SDXL_UNET,
        )
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    reached = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, kinds) and name.startswith(("down_", "mid_", "up_"))
    ]
    assert real.models["sdxl-4step-lora"].lora_modules == len(reached)
