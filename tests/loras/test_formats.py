"""Keys of LoRA files: each counts exactly once, and what cannot be used is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from drawn_loras import Tensors, Weights, merged

from dmd2.errors import LoraError
from dmd2.loras.formats import parse_lora
from dmd2.loras.names import ModuleNames

Q = "down_blocks.2.attentions.0.transformer_blocks.1.attn1.to_q"  # [64, 64], no bias
CONV = "down_blocks.2.resnets.0.conv1"  # [64, 32, 3, 3] and a bias
NORM = "down_blocks.2.resnets.0.norm1"  # [32] and a bias
TE2 = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"  # [64, 32] and a bias


def ones(**shapes: tuple[int, ...]) -> Callable[[str], Tensors]:
    """Tensors by their keys' ends, in which __ is a dot, after a module's name."""
    return lambda module: {
        f"{module}.{end.replace('__', '.')}": torch.ones(shape) for end, shape in shapes.items()
    }


def lora_of(module: str, rank: int = 2) -> Tensors:
    """A good LoRA for Q, by any name of it."""
    return ones(lora_down__weight=(rank, 64), lora_up__weight=(64, rank), alpha=())(module)


# One good file of each format.
GOOD: dict[str, Tensors] = {
    "kohya": lora_of(f"lora_unet_{Q.replace('.', '_')}"),
    "kohya-sgm": lora_of("lora_unet_input_blocks_5_1_transformer_blocks_1_attn1_to_q"),
    "locon": ones(lora_down__weight=(2, 32, 3, 3), lora_up__weight=(64, 2, 1, 1))(CONV),
    "locon-mid": ones(
        lora_down__weight=(2, 32, 1, 1),
        lora_mid__weight=(2, 2, 3, 3),
        lora_up__weight=(64, 2, 1, 1),
    )(CONV),
    "conv-shaped-matrix": ones(lora_down__weight=(2, 64, 1, 1), lora_up__weight=(64, 2, 1, 1))(Q),
    "peft": ones(lora_A__weight=(2, 64), lora_B__weight=(64, 2))(f"unet.{Q}"),
    "peft-named": ones(lora_A__default__weight=(2, 64), lora_B__default__weight=(64, 2))(Q),
    "peft-dora": ones(lora_A__weight=(2, 64), lora_B__weight=(64, 2), lora_magnitude_vector=(64,))(
        f"base_model.model.{Q}"
    ),
    "loha": ones(hada_w1_a=(64, 2), hada_w1_b=(2, 64), hada_w2_a=(64, 2), hada_w2_b=(2, 64))(Q),
    "lokr": ones(lokr_w1=(8, 8), lokr_w2_a=(8, 2), lokr_w2_b=(2, 8), alpha=())(Q),
    "lokr-flat": ones(lokr_w1=(8, 8), lokr_w2_a=(8, 2), lokr_w2_b=(2, 4 * 9))(CONV),
    "lokr-whole": ones(lokr_w1=(8, 8), lokr_w2=(8, 8), alpha=())(Q),
    "dora": lora_of(Q) | ones(dora_scale=(64, 1))(Q),
    "dora-by-input": lora_of(Q) | ones(dora_scale=(1, 64))(Q),
    "full": ones(diff=(64, 32, 3, 3), diff_b=(64,))(CONV),
    "bias-alone": ones(diff_b=(64,))(CONV),
    "norm": ones(w_norm=(32,), b_norm=(32,))(NORM),
    "norm-diff": ones(diff=(32,), diff_b=(32,))(NORM),
    "text": ones(lora_down__weight=(2, 32), lora_up__weight=(64, 2))(TE2),
    "text-projection": ones(lora_down__weight=(2, 32), lora_up__weight=(32, 2))(
        "lora_te2_text_projection"
    ),
    "embedding": ones(diff=(49408, 32))("lora_te1_text_model_embeddings_token_embedding"),
}


@pytest.mark.parametrize("file", GOOD)
def test_a_good_file_changes_its_module_alone(
    weights: Weights, names: ModuleNames, file: str
) -> None:
    lora = parse_lora(GOOD[file], {}, names)
    found = merged(weights, (lora, 1.0))
    changed = {
        (part, name)
        for part, tensors in weights.items()
        for name, tensor in tensors.items()
        if not torch.equal(found[part][name], tensor)
    }
    targets = {
        names.find(key.partition(end)[0]) for key in GOOD[file] for end in ENDS if end in key
    }
    assert {(part, name.rpartition(".")[0]) for part, name in changed} == targets
    assert changed == {(part, name) for part, deltas in lora.deltas.items() for name in deltas}


ENDS = (".lora_", ".hada_", ".lokr_", ".diff", ".w_norm", ".b_norm")


@pytest.mark.parametrize("more", ["lora_unet_nothing.lora_up.weight", f"{Q}.scalar", "step"])
@pytest.mark.parametrize("file", GOOD)
def test_one_unknown_key_is_refused_and_named(names: ModuleNames, file: str, more: str) -> None:
    with pytest.raises(LoraError, match=rf"1 unknown keys \('{more}'\): they belong to no"):
        parse_lora({**GOOD[file], more: torch.ones(1)}, {}, names)


@pytest.mark.parametrize("file", [file for file, lora in GOOD.items() if len(lora) > 2])
def test_a_file_without_one_of_its_keys_is_refused_unless_it_may_lack_it(
    names: ModuleNames, file: str
) -> None:
    for key in GOOD[file]:
        lora = {k: tensor for k, tensor in GOOD[file].items() if k != key}
        if key.endswith((".alpha", ".dora_scale", ".lora_magnitude_vector", "mid.weight")):
            continue  # the last leaves a convolution of 1x1, which is another file's
        with pytest.raises(LoraError, match="not the parts of a module in any format"):
            parse_lora(lora, {}, names)


def test_the_first_three_of_many_unknown_keys_are_named(names: ModuleNames) -> None:
    lora = {f"x{n}\n{'y' * 200}.alpha": torch.ones(()) for n in range(9)}
    with pytest.raises(LoraError) as caught:
        parse_lora(lora, {}, names)
    text = str(caught.value)
    assert "9 unknown keys" in text
    assert text.count(r"\nyyy") == 3
    assert len(text) < 600


KOHYA_Q = f"lora_unet_{Q.replace('.', '_')}"
KOHYA_CONV = f"lora_unet_{CONV.replace('.', '_')}"
# A file, and what the error says.
BAD: list[tuple[Tensors, str]] = [
    # The same module twice.
    (GOOD["kohya"] | GOOD["kohya-sgm"], rf"{Q} stands in it twice, as 'lora_unet_down"),
    (GOOD["kohya"] | GOOD["peft"], rf"{Q} stands in it twice"),
    (ones(lora_down__weight=(2, 64))(KOHYA_Q) | ones(lora_up__weight=(64, 2))(Q), "it twice"),
    (lora_of(Q) | ones(lora_A__weight=(2, 64))(Q), rf"{Q} stands in it twice.*lora_A"),
    (GOOD["norm"] | GOOD["norm-diff"], rf"{NORM} stands in it twice"),
    # Two formats in one module, and parts alone.
    (GOOD["dora"] | GOOD["loha"], "not the parts of a module"),
    (GOOD["full"] | ones(alpha=())(CONV), "has alpha, bias, diff, which are not the parts"),
    (GOOD["full"] | ones(dora_scale=(64, 1, 1, 1))(CONV), "not the parts of a module"),
    (ones(alpha=())(Q), "has alpha, which are not the parts"),
    (GOOD["bias-alone"] | ones(alpha=())(CONV), "not the parts of a module"),
    (GOOD["loha"] | ones(hada_t1=(2, 2, 1, 1))(Q), "not the parts of a module"),
    # Shapes.
    (
        ones(lora_down__weight=(2, 768), lora_up__weight=(64, 2))(KOHYA_Q),
        rf"'{KOHYA_Q}' has down \[2, 768\], up \[64, 2\], and {Q}.weight has the shape \[64, 64\]: "
        "it was made for another model, such as Stable Diffusion 1",
    ),
    (ones(lora_down__weight=(2, 64), lora_up__weight=(64, 3))(Q), r"up \[64, 3\]"),
    (ones(lora_down__weight=(2, 64), lora_up__weight=(32, 2))(Q), r"up \[32, 2\]"),
    (ones(lora_down__weight=(2, 64), lora_up__weight=(64,))(Q), r"up \[64\]"),
    (ones(lora_down__weight=(), lora_up__weight=(64, 2))(Q), r"down \[\]"),
    (ones(lora_down__weight=(2, 16, 2, 2), lora_up__weight=(64, 2))(Q), r"down \[2, 16, 2, 2\]"),
    (ones(lora_down__weight=(3, 32, 3, 3), lora_up__weight=(64, 1, 1, 3))(CONV), "up"),
    (ones(lora_down__weight=(3, 32, 1, 1), lora_up__weight=(64, 3, 1, 1))(CONV), "down"),
    (ones(lora_down__weight=(3, 3, 3, 32), lora_up__weight=(64, 3, 1, 1))(CONV), "down"),
    (
        # Its product would fit; on the way it would take as much as it likes.
        ones(
            lora_down__weight=(99, 32, 1, 1),
            lora_mid__weight=(1, 99, 3, 3),
            lora_up__weight=(64, 1, 1, 1),
        )(CONV),
        r"mid \[1, 99, 3, 3\]",
    ),
    (ones(lokr_w1=(8, 8), lokr_w2=(8, 4))(Q), "lokr_w2"),
    (ones(lokr_w1=(), lokr_w2=())(Q), "lokr_w2"),
    (ones(diff=(64, 16))(Q), "diff"),
    (ones(diff=())(Q), "diff"),
    (ones(diff=(16, 2))(NORM), "diff"),
    (lora_of(Q) | ones(dora_scale=(64,))(Q), "magnitude"),
    (lora_of(Q) | ones(dora_scale=(64, 64))(Q), "magnitude"),
    (lora_of(Q) | ones(dora_scale=(64, 1, 1, 1))(Q), "magnitude"),
    (ones(lora_down__weight=(2, 32), lora_up__weight=(32, 2))(NORM), "norm1"),
    (ones(diff_b=(64,))(Q), r"to_q.bias the model does not have"),
    # Alphas.
    (lora_of(KOHYA_Q) | ones(alpha=(2,))(KOHYA_Q), f"'{KOHYA_Q}'.alpha is 0 or no number"),
    (lora_of(Q) | {f"{Q}.alpha": torch.zeros(())}, "alpha is 0 or no number"),
    # Other formats and models.
    (ones(oft_blocks=(4, 16, 16), alpha=())(Q), "OFT and BOFT"),
    (ones(oft_R__weight=(4, 16, 16))(Q), "OFT and BOFT"),
    (ones(a1__weight=(4, 64), b1__weight=(4, 64), alpha=())(Q), "GLoRA"),
    (ones(weight=(64,), on_input=())(Q), r"\(IA\)\^3"),
    (GOOD["kohya"] | {"bundle_emb.cat.clip_g": torch.ones(1, 32)}, "embeddings bundled"),
    ({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 32)}, "textual inversion"),
    ({"emb_params": torch.ones(2, 32)}, "textual inversion"),
    (lora_of("lora_te_text_model_encoder_layers_0_mlp_fc1"), "Stable Diffusion 1 or 2"),
    (lora_of("lora_unet_down_blocks_0_attentions_0_proj_in"), "Stable Diffusion 1 or 2"),
    (lora_of("lora_unet_double_blocks_0_img_attn_proj"), "Flux, SD3"),
    (lora_of("transformer.single_transformer_blocks.0.attn.to_q"), "Flux, SD3"),
    (lora_of("transformer.transformer_blocks.0.attn.to_q"), "Flux, SD3"),
    (lora_of("diffusion_model.joint_blocks.0.x_block.attn.qkv"), "Flux, SD3"),
    ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, "a whole checkpoint"),
]


@pytest.mark.parametrize(("lora", "message"), BAD)
def test_a_file_that_cannot_be_used_is_refused(
    names: ModuleNames, lora: Tensors, message: str
) -> None:
    with pytest.raises(LoraError, match=message):
        parse_lora(lora, {}, names)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"unet.lora_alpha": "strong"}',
        '{"unet.lora_alpha": [1]}',
        '{"unet.alpha_pattern": [1]}',
        '{"unet.alpha_pattern": {"to_q": null}}',
        '{"unet.alpha_pattern": {"(a+)+b": 1}}',
        '{"lora_alpha": {}}',
    ],
)
def test_an_adapters_config_that_cannot_be_read_is_refused(names: ModuleNames, config: str) -> None:
    with pytest.raises(LoraError, match="lora_adapter_metadata in its header cannot be read"):
        parse_lora(GOOD["peft"], {"lora_adapter_metadata": config}, names)


@pytest.mark.parametrize(
    ("file", "config", "factor"),
    [
        ("kohya", {}, 1 / 2),
        ("peft", {}, 1.0),
        ("peft", {"unet.lora_alpha": 3}, 3 / 2),
        ("peft", {"lora_alpha": 3}, 3 / 2),
        ("peft", {"unet.lora_alpha": 3, "unet.use_rslora": True}, 3 / 2**0.5),
        ("peft", {"unet.lora_alpha": 3, "unet.alpha_pattern": {"attn1.to_q": 5}}, 5 / 2),
        ("peft", {"unet.lora_alpha": 3, "unet.alpha_pattern": {"n1.to_q": 5}}, 3 / 2),
        ("peft", {"text_encoder.lora_alpha": 3}, 1.0),
        ("kohya", {"unet.lora_alpha": 3}, 1 / 2),
        ("text", {"text_encoder.lora_alpha": 3, "text_encoder_2.lora_alpha": 5}, 5 / 2),
        ("lokr", {}, 1 / 2),
        ("lokr-whole", {}, 1.0),
    ],
)
def test_the_factor_is_alpha_by_rank(
    names: ModuleNames, file: str, config: dict[str, object], factor: float
) -> None:
    lora = parse_lora(GOOD[file], {"lora_adapter_metadata": json.dumps(config)}, names)
    (deltas,) = lora.deltas.values()
    (delta,) = deltas.values()
    assert delta.factor == pytest.approx(factor)


def test_it_says_what_the_file_says_of_itself(names: ModuleNames) -> None:
    header = {
        "ss_network_module": "networks.lora",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "ss_tag_frequency": json.dumps({"10_a": {"ohwx ": 20, "cat": 3}, "b": {"cat": 30, "x": 1}}),
    }
    lora = GOOD["locon"] | lora_of(Q, rank=8)
    assert parse_lora(lora, header, names).about == {
        "ranks": "2, 8",
        "network": "networks.lora",
        "base": "stable-diffusion-xl-v1-base/lora",
        "triggers": "cat, ohwx, x",
    }
    header["modelspec.trigger_phrase"] = "ohwx\n\x1b[31m" + "!" * 1000
    assert parse_lora(lora, header, names).about["triggers"] == f"ohwx[31m{'!' * 192}"


@pytest.mark.parametrize(
    "tags", ["{", "[]", "{}", '{"a": 1}', '{"a": {"b": []}}', '{"a": {"b": 1e999}}']
)
def test_a_header_that_says_nothing_costs_nothing(names: ModuleNames, tags: str) -> None:
    about = parse_lora(GOOD["full"], {"ss_tag_frequency": tags}, names).about
    assert about == {}
