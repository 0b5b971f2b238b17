"""LyCORIS' own networks: what they compute is what their files, merged, compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_loras import Weights
from lycoris import create_lycoris
from torch import nn

from dmd2.loras.delta import merge
from dmd2.loras.formats import read_lora
from dmd2.loras.names import ModuleNames

PARTS = {
    "lora": {"lora_up.weight", "lora_down.weight", "alpha"},
    "tucker": {"lora_mid.weight"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    "loha tucker": {"hada_t1", "hada_t2"},
    "lokr": {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"},
    "lokr tucker": {"lokr_t2"},
    "lokr both": {"lokr_w1_a", "lokr_w1_b"},
    "lokr whole": {"lokr_w1", "lokr_w2", "alpha"},
    "dora": {"dora_scale"},
    "full": {"diff", "diff_b"},
    "norm": {"w_norm", "b_norm"},
}
TUCKER = {"use_tucker": True, "conv_dim": 3}
# What is asked of LyCORIS, and the kinds of PARTS that its file then has.
NETWORKS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "lora": ({"algo": "lora"}, ("lora",)),
    "lora-tucker": ({"algo": "lora", **TUCKER}, ("lora", "tucker")),
    "lora-rank-stabilised": ({"algo": "lora", "rs_lora": True}, ("lora",)),
    "loha": ({"algo": "loha"}, ("loha",)),
    "loha-tucker": ({"algo": "loha", **TUCKER}, ("loha", "loha tucker")),
    "lokr": ({"algo": "lokr", "factor": 2}, ("lokr",)),
    "lokr-auto": ({"algo": "lokr", "factor": -1}, ("lokr whole",)),
    "lokr-tucker": ({"algo": "lokr", "factor": 2, **TUCKER}, ("lokr", "lokr tucker")),
    "lokr-both": ({"algo": "lokr", "factor": 16, "decompose_both": True}, ("lokr both",)),
    "lokr-whole": ({"algo": "lokr", "factor": 4, "full_matrix": True}, ("lokr whole",)),
    "lokr-unbalanced": (
        {"algo": "lokr", "factor": 4, "unbalanced_factorization": True},
        ("lokr",),
    ),
    "dora": ({"algo": "lora", "dora_wd": True}, ("lora", "dora")),
    "dora-by-input": ({"algo": "lora", "dora_wd": True, "wd_on_output": False}, ("dora",)),
    "doha-by-input": ({"algo": "loha", "dora_wd": True, "wd_on_output": False}, ("loha", "dora")),
    "dokr": ({"algo": "lokr", "dora_wd": True, "factor": 2, **TUCKER}, ("lokr", "dora")),
    "full": ({"algo": "full", "train_norm": True}, ("full", "norm")),
}


LAYERS = (
    "conv_in",
    "down_blocks.2.resnets.0.norm1",
    "down_blocks.2.resnets.0.conv1",
    "down_blocks.2.resnets.0.conv_shortcut",
    "down_blocks.2.resnets.0.time_emb_proj",
    "down_blocks.2.attentions.0.proj_in",
    "down_blocks.2.attentions.0.transformer_blocks.1.norm1",
    "down_blocks.2.attentions.0.transformer_blocks.1.attn2.to_k",
    "down_blocks.2.attentions.0.transformer_blocks.1.ff.net.0.proj",
)


@pytest.fixture(scope="module")
def unet(stock: Any) -> Any:
    return stock().unet


@pytest.mark.parametrize("network", NETWORKS)
def test_merged_it_computes_what_lycoris_computes(
    unet: Any, weights: Weights, names: ModuleNames, tmp_path: Path, network: str
) -> None:
    options, kinds = NETWORKS[network]
    lycoris = create_lycoris(_some_of(unet), 1.0, linear_dim=4, linear_alpha=2.0, **options)
    lycoris.apply_to()
    _randomise(lycoris)
    lycoris.save_weights(str(tmp_path / "lora.safetensors"), torch.float32, None)
    deltas = read_lora(tmp_path / "lora.safetensors", names).deltas
    merged = merge(weights["unet"], [(deltas["unet"], 1.0)])

    kept = {key.partition(".")[2] for key in lycoris.state_dict()}
    assert kept >= set().union(*(PARTS[kind] for kind in kinds))
    assert deltas.keys() == {"unet"}
    changed = set()
    for layer in lycoris.loras:
        name = next(n for n in LAYERS if n.replace(".", "_") == layer.lora_name[len("lycoris_") :])
        module = unet.get_submodule(name)
        own = {k: merged.pop(f"{name}.{k}") for k in ("weight", "bias") if f"{name}.{k}" in merged}
        with torch.no_grad():
            sample = _sample(module)
            before, expected = module(sample), layer(sample)
            after = torch.func.functional_call(module, own, sample)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4, msg=name)
        if (expected - before).abs().max() > 0.1:
            changed.add(name)
    assert not merged, "nothing that LyCORIS does not change"
    assert changed == {name for name in LAYERS if "norm" in kinds or "norm" not in name}


def _some_of(unet: nn.Module) -> nn.Module:
    """A module with copies of LAYERS at their places."""
    root = nn.Module()
    for name in LAYERS:
        parent = root
        *path, last = name.split(".")
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(last, copy.deepcopy(unet.get_submodule(name)))
    return root


def _randomise(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 4


def _sample(module: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    if isinstance(module, nn.Conv2d):
        return torch.randn(1, module.in_channels, 6, 6, generator=generator)
    if isinstance(module, nn.GroupNorm):
        return torch.randn(1, module.num_channels, 4, 4, generator=generator)
    return torch.randn(3, module.weight.shape[-1], generator=generator)
