"""Finding and verifying installed models, and the real manifest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hub_world import CARD, MODEL_FILES, RECORD, WEIGHTS, World
from random_model import SDXL_UNET

from dmd2.errors import MissingWeightsError, ModelError
from dmd2.store.locating import locate
from dmd2.store.manifest import Manifest, sha256_of, write_record
from training.model_folder import TOKENIZER_FILES, write_tokenizer


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
    # What the repository ships itself has its own revision.
    assert all(is_hex(source.revision, 40) for source in sources if not source.local)
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
    sdxl, demo = models[:3], models[3:]
    assert [model.name for model in sdxl] == ["sdxl-4step", "sdxl-4step-lora", "sdxl-1step"]
    assert [model.name for model in demo] == ["demo", "demo-1step", "demo-lora"]
    for model in models:
        assert {file.target for file in model.files} == MODEL_FILES
        assert model.card is not None
        assert model.card["name"] == model.name
    for model in sdxl:
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
