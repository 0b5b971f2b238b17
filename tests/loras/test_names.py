"""The names of modules: sgm's against stock diffusers' own table, and every other spelling."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from random_model import random_unet
from torch import nn

from dmd2.loras.names import ModuleNames, blocks_per_level, sgm_name


@pytest.mark.parametrize(("size", "num_modules"), [("tiny", 174), ("sdxl", 794)])
def test_sgm_names_are_mapped_as_stock_diffusers_maps_them(size: str, num_modules: int) -> None:
    with torch.device("meta"):
        unet = random_unet(size)
    modules = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(modules) == num_modules
    names = ModuleNames.of({"unet": dict(unet.named_parameters())})
    lora = {}
    for index, module in enumerate(modules):
        sgm = sgm_name(module, unet.config.layers_per_block + 1).replace(".", "_")
        assert names.find(f"lora_unet_{sgm}") == ("unet", module)
        assert names.find(f"lora_unet_{module.replace('.', '_')}") == ("unet", module)
        for part in ("down", "up"):
            lora[f"lora_unet_{sgm}.lora_{part}.weight"] = torch.tensor(index)

    stock, _ = _convert_non_diffusers_lora_to_diffusers(
        _maybe_map_sgm_blocks_to_diffusers(lora, unet.config)
    )
    stock = {key.removeprefix("unet."): index for key, index in stock.items()}
    assert len(stock) == 2 * num_modules
    for key, index in convert_unet_state_dict_to_peft(stock).items():
        module, _, _ = key.partition(".lora_")
        assert module == modules[index]

    split = {name: name.rpartition(".") for name, _ in unet.named_parameters()}
    blocks = blocks_per_level(split)
    checkpoint = {
        f"model.diffusion_model.{sgm_name(module, blocks)}.{kind}": name
        for name, (module, _, kind) in split.items()
    }
    assert convert_ldm_unet_checkpoint(checkpoint, unet.config) == {name: name for name in split}


def test_no_spelling_means_two_modules() -> None:
    with torch.device("meta"):
        unet = random_unet("sdxl")
    modules = [n for n, m in unet.named_modules() if hasattr(m, "weight")]
    spelt = {n.replace(".", "_") for m in modules for n in (m, sgm_name(m, 3))}
    assert len(spelt) == 2 * len(modules)


TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "mid_block.attentions.0.transformer_blocks.1.attn2.to_out.0"
# How a key spells it, and what it is: encoder 1 has no text_model. in today's transformers.
SPELLINGS = [
    (f"unet.{TO_Q}", "unet", TO_Q),
    (TO_Q, "unet", TO_Q),
    (f"base_model.model.{TO_Q}", "unet", TO_Q),
    (f"unet.base_model.model.{TO_Q}", "unet", TO_Q),
    (f"lycoris_{TO_Q.replace('.', '_')}", "unet", TO_Q),
    (f"unet.{TO_Q.replace('to_q', 'processor.to_q')}", "unet", TO_Q),
    (f"unet.{TO_OUT.replace('to_out.0', 'processor.to_out')}", "unet", TO_OUT),
    (f"unet.{TO_OUT.removesuffix('.0')}", "unet", TO_OUT),
    ("diffusion_model.middle_block.1.transformer_blocks.1.attn2.to_out.0", "unet", TO_OUT),
    *(
        (spelling, part, prefix + "encoder.layers.1.self_attn.out_proj")
        for number, part, prefix in ((1, "text_encoder", ""), (2, "text_encoder_2", "text_model."))
        for spelling in (
            f"lora_te{number}_text_model_encoder_layers_1_self_attn_out_proj",
            f"{part}.text_model.encoder.layers.1.self_attn.out_proj",
            f"{part}.encoder.layers.1.self_attn.out_proj",
            f"{part}.text_model.encoder.layers.1.self_attn.to_out",
        )
    ),
    ("lora_te2_text_projection", "text_encoder_2", "text_projection"),
]


@pytest.mark.parametrize(("spelling", "part", "module"), SPELLINGS)
def test_a_module_is_found_by_each_spelling(
    names: ModuleNames, spelling: str, part: str, module: str
) -> None:
    assert names.find(spelling) == (part, module)


@pytest.mark.parametrize(
    "spelling",
    [
        "lora_te_text_model_encoder_layers_1_self_attn_out_proj",
        "lora_te1_text_projection",
        "text_projection",
        "lora_unet_",
        "lora_unet",
        "",
        f"text_encoder.{TO_Q}",
        f"unet.unet.{TO_Q}",
        "lora_unet_input_blocks_99_1_proj_in",
    ],
)
def test_another_spelling_is_not_found(names: ModuleNames, spelling: str) -> None:
    assert names.find(spelling) is None
