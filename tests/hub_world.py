"""A tiny hub on loopback, the manifest that describes it, and where its models are installed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import close_session
from local_hub import Key, LocalHub, revision_of
from random_model import write_random_model
from safetensors.torch import load, load_file, save

from dmd2.errors import DownloadError
from dmd2.store.install import install
from dmd2.store.manifest import Manifest, verify

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
        assert {path.name for path in self.weights_dir.iterdir()} <= {".downloads", ".lock"}
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


def raising(error: BaseException) -> Callable[..., None]:
    """A function that only raises."""

    def function(*_: object, **__: object) -> None:
        raise error

    return function
