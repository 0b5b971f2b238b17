"""kohya's, peft's and diffusers' own files: merged as stock diffusers fuses them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from drawn_loras import Tensors, Weights, assert_same, low_rank, merged
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from dmd2.loras.formats import parse_lora, read_lora
from dmd2.loras.names import MODEL_PARTS, ModuleNames, sgm_name

MakeStock = Callable[[], Any]
FILE = "lora.safetensors"
# Some of each kind; test_names.py has them all.
UNET_LAYERS = re.compile(
    r"conv_in|conv_out|time_embedding.*|down_blocks\.1\.downsamplers.*|mid_block\.resnets\.1.*"
    r"|down_blocks\.2\.(resnets|attentions)\.0.*|up_blocks\.[01]\.upsamplers.*"
)
TEXT_LAYERS = re.compile(r".*layers\.1\..+(_proj|fc1|fc2)")
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def layers(weights: Weights, part: str) -> dict[str, torch.Size]:
    """The layers that the tests' LoRAs reach, and the shapes of their weights."""
    wanted = UNET_LAYERS if part == "unet" else TEXT_LAYERS
    shapes = {k.removesuffix(".weight"): t.shape for k, t in weights[part].items() if t.ndim > 1}
    return {name: shape for name, shape in shapes.items() if wanted.fullmatch(name)}


def kohya(weights: Weights, *, sgm: bool, seed: int = 0) -> Tensors:
    """A LoRA as kohya's trainer writes it."""
    shapes = {}
    for part in MODEL_PARTS:
        for name, shape in layers(weights, part).items():
            if part == "unet":
                spelt = sgm_name(name, 2) if sgm else name
            else:
                spelt = f"text_model.{name.removeprefix('text_model.')}"
            shapes[KOHYA[part] + spelt.replace(".", "_")] = shape
    return low_rank(shapes, rank=4, alpha=3.0, seed=seed)


def peft(weights: Weights) -> Tensors:
    """A LoRA as diffusers writes it."""
    shapes = {f"{part}.{n}": s for part in MODEL_PARTS for n, s in layers(weights, part).items()}
    lora = low_rank(shapes, rank=4, alpha=None)
    return {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): lora[k] for k in lora}


def with_linear_layers(lora: Tensors) -> Tensors:
    """The same as diffusers wrote it from 0.22 to 0.25."""
    in_unet, in_text = ".lora.", ".lora_linear_layer."
    return {
        re.sub(r"\.lora_([AB])\.", in_unet if key.startswith("unet") else in_text, key).replace(
            ".weight", ".down.weight" if "lora_A" in key else ".up.weight"
        ): tensor
        for key, tensor in lora.items()
    }


def with_processors(lora: Tensors) -> Tensors:
    """The same as before 0.22, when LoRAs reached attention alone."""
    return {
        re.sub(r"\.to_(\w+)(\.0)?\.lora\.", r".processor.to_\1_lora.", key)
        if key.startswith("unet")
        else re.sub(r"\.(\w+)_proj\.lora_linear_layer\.", r".to_\1_lora.", key): tensor
        for key, tensor in with_linear_layers(lora).items()
        if "attn" in key
    }


# A file, and what may not be found in its keys.
FILES: dict[str, tuple[Callable[[Weights], Tensors], str]] = {
    "peft": (peft, "lora_down"),
    "linear-layers": (lambda weights: with_linear_layers(peft(weights)), r"lora_[AB]"),
    "processors": (lambda weights: with_processors(peft(weights)), r"lora_[AB]|lora_linear"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_merged_as_diffusers_fuses_it(
    stock: MakeStock, weights: Weights, names: ModuleNames, tmp_path: Path, file: str
) -> None:
    make, others = FILES[file]
    lora = make(weights)
    assert not [key for key in lora if re.search(others, key)]
    save_file(lora, tmp_path / FILE)
    expected = fused(stock(), (tmp_path, -0.8))
    assert_same(merged(weights, (read_lora(tmp_path / FILE, names), -0.8)), expected, weights)


def test_kohyas_two_kinds_of_files_are_added(
    stock: MakeStock, weights: Weights, names: ModuleNames, tmp_path: Path
) -> None:
    both = [(tmp_path / "a", 0.7), (tmp_path / "b", -0.5)]
    for seed, (folder, _) in enumerate(both):
        folder.mkdir()
        save_file(kohya(weights, sgm=bool(seed), seed=seed), folder / FILE)
    loras = [(read_lora(folder / FILE, names), scale) for folder, scale in both]
    assert_same(merged(weights, *loras), fused(stock(), *both), weights)


def fused(pipe: Any, *loras: tuple[Path, float]) -> dict[str, Tensors]:
    """A stock pipeline's weights with LoRAs fused, one after the other."""
    for folder, scale in loras:
        pipe.load_lora_weights(folder, weight_name=FILE)
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
    return {part: dict(getattr(pipe, part).state_dict()) for part in MODEL_PARTS}


def test_sgms_and_diffusers_names_may_stand_in_one_file(
    weights: Weights, names: ModuleNames
) -> None:
    """Stock diffusers drops sgm's from such a file, silently."""
    sgm, own = kohya(weights, sgm=True), kohya(weights, sgm=False)
    mixed = {key: tensor for key, tensor in sgm.items() if "input_blocks" in key}
    mixed |= {
        key: tensor for key, tensor in own.items() if not re.search("down_blocks|conv_in", key)
    }
    assert mixed.keys() - sgm.keys()
    assert mixed.keys() - own.keys()
    found, expected = (merged(weights, (parse_lora(f, {}, names), 1.0)) for f in (mixed, own))
    assert_same(found, expected, weights)


# What peft is asked for.
ADAPTERS: dict[str, dict[str, Any]] = {
    "alphas": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "alpha_pattern": {"to_k": 8, "^mid_block.resnets.1.conv1": 2, "layers.1.mlp.fc1": 5},
        "rank_pattern": {"to_q": 2},
    },
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
}


@pytest.mark.filterwarnings("ignore:The following")  # patterns that are the other models'
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_diffusers_saves_is_merged_as_peft_merges_it(
    stock: MakeStock, weights: Weights, names: ModuleNames, tmp_path: Path, adapter: str
) -> None:
    pipe = stock()
    for part in MODEL_PARTS:
        add_adapter(getattr(pipe, part), list(layers(weights, part)), ADAPTERS[adapter])
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        weight_name=FILE,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        text_encoder_2_lora_layers=get_peft_model_state_dict(pipe.text_encoder_2),
        **_collate_lora_metadata({part: getattr(pipe, part) for part in MODEL_PARTS}),
    )
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = {part: dict(getattr(pipe, part).state_dict()) for part in MODEL_PARTS}
    assert_same(merged(weights, (read_lora(tmp_path / FILE, names), 1.0)), expected, weights)


def test_a_unets_own_adapter_needs_no_prefix(
    stock: MakeStock, weights: Weights, names: ModuleNames, tmp_path: Path
) -> None:
    unet = stock().unet
    add_adapter(unet, list(layers(weights, "unet")), ADAPTERS["dora"])
    unet.save_lora_adapter(tmp_path, adapter_name="default", weight_name=FILE)
    unet.fuse_lora()
    unet.unload_lora()
    expected = {**weights, "unet": dict(unet.state_dict())}
    assert_same(merged(weights, (read_lora(tmp_path / FILE, names), 1.0)), expected, weights)


def add_adapter(model: Any, modules: list[str], config: dict[str, Any]) -> None:
    """An adapter that looks trained."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.add_adapter(LoraConfig(target_modules=modules, init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter += 0.3
