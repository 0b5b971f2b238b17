"""Model folders: strict loading, checked configs, cards."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import copy_with
from safetensors.torch import load_file, save_file

from dmd2.errors import ModelError
from dmd2.model_card import ModelCard
from dmd2.models import loading
from dmd2.sampling.pipeline import Pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"

Weights = dict[str, torch.Tensor]


def with_weights(folder: Path, to: Path, file: str, change: Callable[[Weights], Any]) -> Path:
    shutil.copytree(folder, to)
    weights = load_file(to / file)
    change(weights)
    save_file(weights, to / file, metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_missing_key_names_itself(file: str, model_folder: Path, tmp_path: Path) -> None:
    key = sorted(load_file(model_folder / file))[3]
    folder = with_weights(model_folder, tmp_path / "m", file, lambda w: w.pop(key))
    with pytest.raises(ModelError, match="missing") as caught:
        Pipeline.load(folder, "cpu")
    assert key.removeprefix("text_model.") in str(caught.value)
    assert file.split("/")[0] in str(caught.value)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_an_unexpected_key_names_itself(file: str, model_folder: Path, tmp_path: Path) -> None:
    folder = with_weights(
        model_folder, tmp_path / "m", file, lambda w: w.update(stray=torch.zeros(1))
    )
    with pytest.raises(ModelError, match=r"unexpected.*stray"):
        Pipeline.load(folder, "cpu")


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_wrong_shape_names_its_key(file: str, model_folder: Path, tmp_path: Path) -> None:
    key = sorted(load_file(model_folder / file))[3]
    folder = with_weights(
        model_folder, tmp_path / "m", file, lambda w: w.update({key: torch.zeros(3, 3)})
    )
    with pytest.raises(ModelError) as caught:
        Pipeline.load(folder, "cpu")
    assert key.removeprefix("text_model.") in str(caught.value)


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "epsilon"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero_snr"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "1000"),
        ("vae/config.json", {"scaling_factor": 0.18215}, "Stable Diffusion 1.5"),
        ("vae/config.json", {"scaling_factor": None}, "Stable Diffusion 1.5"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ("dmd2.json", {"timesteps": {"4": [999, 749, 499]}}, "4 steps"),
        ("dmd2.json", {"timesteps": {"2": [499, 999]}}, "strictly"),
        ("dmd2.json", {"community_steps": {"8": [999]}}, "community_steps: 8 steps are given 1"),
        ("dmd2.json", {"community_steps": {"1": [1000]}}, "community_steps: .*1000.* strictly"),
        ("dmd2.json", {"community_steps": {"2": [999, 9]}}, "2 steps, which timesteps has too"),
        ("dmd2.json", {"default_steps": 3}, r"is 3, and must be one of .*\(2, 4\); use one of"),
        ("dmd2.json", {"default_size": [60, 64]}, "default_size"),
        ("dmd2.json", {"stepz": 4}, "stepz"),
    ],
)
def test_a_config_that_would_sample_wrongly_is_refused(
    config: str, change: dict[str, Any], said: str, model_folder: Path, tmp_path: Path
) -> None:
    folder = copy_with(model_folder, tmp_path / "m", config, lambda c: c.update(change))
    with pytest.raises(ModelError, match=said):
        Pipeline.load(folder, "cpu")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2", "tokenizer", "scheduler"])
def test_a_missing_part_names_itself(part: str, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / part)
    with pytest.raises(ModelError, match=part):
        Pipeline.load(tmp_path / "m", "cpu")


def test_a_pickle_is_never_loaded(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    weights = load_file(tmp_path / "m" / UNET)
    (tmp_path / "m" / UNET).unlink()
    torch.save(weights, tmp_path / "m" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="unet"):
        Pipeline.load(tmp_path / "m", "cpu")


def test_text_encoders_load_by_sdxls_own_key_names(model_folder: Path, tmp_path: Path) -> None:
    """SDXL's files say text_model.*, which is not what transformers calls them now."""

    def rename(weights: Weights) -> None:
        for key in list(weights):
            if not key.startswith(("text_model.", "text_projection.")):
                weights[f"text_model.{key}"] = weights.pop(key)

    for part in ("text_encoder", "text_encoder_2"):
        folder = with_weights(model_folder, tmp_path / part, f"{part}/model.safetensors", rename)
        assert any(
            k.startswith("text_model.") for k in load_file(folder / part / "model.safetensors")
        )
        Pipeline.load(folder, "cpu")


def test_a_folder_without_a_card_is_a_four_step_sdxl(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "my-model")
    (tmp_path / "my-model" / "dmd2.json").unlink()
    card = ModelCard.read(tmp_path / "my-model")
    assert card.name == "my-model"
    assert card.timesteps == {4: (999, 749, 499, 249)}
    assert card.default_size == (64, 64), "the UNet's sample_size times the VAE's factor"


def test_a_card_that_is_not_json_names_itself(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "dmd2.json").write_text("{")
    with pytest.raises(ModelError, match=r"dmd2\.json"):
        ModelCard.read(tmp_path / "m")


def test_sdxl_on_the_cpu_is_warned_about(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING, "dmd2.models.loading"):
        loading._warn_of_cpu(pipeline.unet.plain, cpu)
        monkeypatch.setattr(loading, "_SDXL_UNET_PARAMETERS", 1000)
        loading._warn_of_cpu(pipeline.unet.plain, cuda)
        assert not caplog.records
        loading._warn_of_cpu(pipeline.unet.plain, cpu)
    assert "takes minutes" in caplog.text


def test_devices_and_dtypes() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA device"):
            loading.choose_device("cuda")
    assert loading.choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert loading.choose_dtype("auto", torch.device("cuda", 0)) == torch.float16
    assert loading.choose_dtype("bfloat16", torch.device("cuda", 0)) == torch.bfloat16
    with pytest.raises(ModelError, match="int8"):
        loading.choose_dtype("int8", torch.device("cpu"))


def test_the_card_is_json_that_people_can_write(model_folder: Path) -> None:
    said = json.loads((model_folder / "dmd2.json").read_text())
    card = ModelCard.read(model_folder)
    assert card.timesteps == {int(k): tuple(v) for k, v in said["timesteps"].items()}
    assert card.default_steps == 4


@pytest.mark.parametrize("default", [2, 4, 8])
def test_the_card_says_which_step_count_is_the_default(
    default: int, model_folder: Path, tmp_path: Path
) -> None:
    eight = [999, 874, 749, 624, 499, 374, 249, 124]
    said = {"community_steps": {"8": eight}, "default_steps": default}
    card = ModelCard.read(
        copy_with(model_folder, tmp_path / "m", "dmd2.json", lambda c: c.update(said))
    )
    assert card.default_steps == default
    assert card.all_timesteps[8] == tuple(eight)
    assert sorted(card.timesteps) == [2, 4]


def test_old_vae_attention_names_are_known(model_folder: Path, tmp_path: Path) -> None:
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(weights: Weights) -> None:
        for key in list(weights):
            for new_name, old_name in old.items():
                if new_name in key:
                    weights[key.replace(new_name, old_name)] = weights.pop(key)

    folder = with_weights(model_folder, tmp_path / "m", VAE, rename)
    assert any(".query." in key for key in load_file(folder / VAE))
    Pipeline.load(folder, "cpu")


def test_sharded_weights_load(model_folder: Path, tmp_path: Path, pipeline: Pipeline) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    weights = load_file(tmp_path / "m" / UNET)
    (tmp_path / "m" / UNET).unlink()
    keys, where = sorted(weights), {}
    for number, shard in enumerate((keys[::2], keys[1::2])):
        name = f"diffusion_pytorch_model-{number}.safetensors"
        save_file({key: weights[key] for key in shard}, tmp_path / "m" / "unet" / name)
        where |= dict.fromkeys(shard, name)
    index = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    loaded = Pipeline.load(tmp_path / "m", "cpu").unet.plain.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in pipeline.unet.plain.state_dict().items())
