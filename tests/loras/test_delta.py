"""Merging a kohya LoRA: the formula by hand, and every file that must not be merged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dmd2.errors import ModelError
from dmd2.loras.delta import merge

Tensors = dict[str, torch.Tensor]

LINEAR, CONV = "lora_unet_mid_block_to_q", "lora_unet_mid_block_conv1"


@pytest.fixture
def weights() -> Tensors:
    """A matrix, a 3x3 convolution, a norm and a bias that no LoRA reaches."""
    generator = torch.Generator().manual_seed(0)
    return {
        "mid_block.to_q.weight": torch.randn(4, 6, generator=generator),
        "mid_block.to_q.bias": torch.randn(4, generator=generator),
        "mid_block.norm.weight": torch.randn(4, generator=generator),
        "mid_block.conv1.weight": torch.randn(5, 3, 3, 3, generator=generator),
    }


@pytest.fixture
def lora() -> Tensors:
    """Rank 2 with alpha 1 on the matrix, rank 3 with alpha 6 on the convolution."""
    generator = torch.Generator().manual_seed(1)
    return {
        f"{LINEAR}.lora_down.weight": torch.randn(2, 6, generator=generator),
        f"{LINEAR}.lora_up.weight": torch.randn(4, 2, generator=generator),
        f"{LINEAR}.alpha": torch.tensor(1.0),
        f"{CONV}.lora_down.weight": torch.randn(3, 3, 3, 3, generator=generator),
        f"{CONV}.lora_up.weight": torch.randn(5, 3, 1, 1, generator=generator),
        f"{CONV}.alpha": torch.tensor(6.0),
    }


def test_numbers_worked_out_by_hand() -> None:
    weights = {"a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    lora = {
        "lora_unet_a.lora_down.weight": torch.tensor([[1.0, 10.0], [0.0, 1.0]]),
        "lora_unet_a.lora_up.weight": torch.tensor([[2.0, 0.0], [0.0, 4.0]]),
        "lora_unet_a.alpha": torch.tensor(1.0),
    }
    # scale 0.5 and alpha / rank = 1 / 2, so a quarter of [[2, 20], [0, 4]].
    expected = torch.tensor([[1.5, 7.0], [3.0, 5.0]])
    assert torch.equal(merge(weights, lora, 0.5, 1)["a.weight"], expected)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -1.0])
def test_every_module_gets_its_own_product(weights: Tensors, lora: Tensors, scale: float) -> None:
    merged = merge(weights, lora, scale, 2)

    up, down = lora[f"{LINEAR}.lora_up.weight"], lora[f"{LINEAR}.lora_down.weight"]
    matrix = weights["mid_block.to_q.weight"] + scale * (1 / 2) * torch.einsum(
        "or,ri->oi", up, down
    )
    torch.testing.assert_close(merged["mid_block.to_q.weight"], matrix)
    up, down = lora[f"{CONV}.lora_up.weight"], lora[f"{CONV}.lora_down.weight"]
    convolution = weights["mid_block.conv1.weight"] + scale * (6 / 3) * torch.einsum(
        "or,rihw->oihw", up[:, :, 0, 0], down
    )
    torch.testing.assert_close(merged["mid_block.conv1.weight"], convolution)


def test_a_merged_convolution_is_the_two_convolutions_in_a_row(
    weights: Tensors, lora: Tensors
) -> None:
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    conv2d = torch.nn.functional.conv2d
    low = conv2d(image, lora[f"{CONV}.lora_down.weight"], padding=1)
    expected = conv2d(image, weights["mid_block.conv1.weight"], padding=1)
    expected += 0.5 * (6 / 3) * conv2d(low, lora[f"{CONV}.lora_up.weight"])
    merged = merge(weights, lora, 0.5, 2)["mid_block.conv1.weight"]
    torch.testing.assert_close(conv2d(image, merged, padding=1), expected, rtol=1e-4, atol=1e-5)


def test_the_rest_and_the_original_stay(weights: Tensors, lora: Tensors) -> None:
    before = {key: tensor.clone() for key, tensor in weights.items()}
    merged = merge(weights, lora, 1.0, 2)
    assert weights.keys() == before.keys() == merged.keys()
    assert all(torch.equal(weights[key], before[key]) for key in before)
    changed = {key for key in merged if not torch.equal(merged[key], before[key])}
    assert changed == {"mid_block.to_q.weight", "mid_block.conv1.weight"}


def test_half_weights_are_summed_in_float32_and_stay_half() -> None:
    weights = {"a.weight": torch.tensor([[1.0]], dtype=torch.float16)}
    lora = {
        "lora_unet_a.lora_down.weight": torch.full((1, 1), 2.0**-13, dtype=torch.float16),
        "lora_unet_a.lora_up.weight": torch.full((1, 1), 2.0**-13, dtype=torch.float16),
        "lora_unet_a.alpha": torch.tensor(2.0**15),
    }
    # up @ down is 2**-26, which half rounds to 0; times alpha and 4 it is 2**-9, 2 ulp of 1.
    merged = merge(weights, lora, 4.0, 1)["a.weight"]
    assert merged.dtype == torch.float16
    assert merged.item() == 1 + 2.0**-9


def without(key: str) -> Callable[[Tensors], None]:
    """Drop a key."""
    return lambda lora: lora.__delitem__(key)


def with_tensor(key: str, *shape: int) -> Callable[[Tensors], None]:
    """Put ones of a shape at a key."""
    return lambda lora: lora.__setitem__(key, torch.ones(shape))


def with_module(module: str) -> Callable[[Tensors], None]:
    """Call the matrix's module something else."""

    def rename(lora: Tensors) -> None:
        for part in (".lora_down.weight", ".lora_up.weight", ".alpha"):
            lora[module + part] = lora.pop(LINEAR + part)

    return rename


# what is done to the LoRA, what the error says
BROKEN: list[tuple[Callable[[Tensors], None], str]] = [
    (without(f"{LINEAR}.alpha"), f"lacks {LINEAR}.alpha"),
    (without(f"{LINEAR}.lora_up.weight"), f"lacks {LINEAR}.lora_up.weight"),
    (without(f"{CONV}.lora_down.weight"), f"lacks {CONV}.lora_down.weight"),
    (with_module("lora_unet_mid_block_to_v"), "no lora_unet_mid_block_to_v"),
    (with_module("lora_unet_mid_block_to_q_bias"), "no lora_unet_mid_block_to_q_bias"),
    (with_module("lora_unet_mid_block_norm"), "mid_block.norm.weight has"),
    (with_tensor(f"{LINEAR}.lora_down.weight", 2, 7), r"down \[2, 7\].*has \[4, 6\]"),
    (with_tensor(f"{LINEAR}.lora_up.weight", 3, 2), r"up \[3, 2\].*has \[4, 6\]"),
    (with_tensor(f"{LINEAR}.lora_up.weight", 4, 3), r"up \[4, 3\] and down \[2, 6\]"),
    (with_tensor(f"{LINEAR}.lora_up.weight", 4), r"up \[4\] and down \[2, 6\]"),
    (with_tensor(f"{LINEAR}.lora_down.weight"), r"down \[\]"),
    (with_tensor(f"{CONV}.lora_up.weight", 5, 3), r"up \[5, 3\]"),
    (with_tensor(f"{CONV}.lora_up.weight", 5, 1, 1, 3), r"up \[5, 1, 1, 3\]"),
    (with_tensor(f"{CONV}.lora_down.weight", 3, 3, 1, 1), r"down \[3, 3, 1, 1\]"),
    (with_tensor(f"{LINEAR}.dora_scale", 4), "mid_block_to_q.dora_scale' is not a key"),
    (with_tensor("lora_te1_text_model.alpha"), "lora_te1_text_model.alpha' is not a key"),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN)
def test_a_broken_lora_is_refused(
    weights: Tensors, lora: Tensors, break_it: Callable[[Tensors], None], message: str
) -> None:
    break_it(lora)
    with pytest.raises(ModelError, match=message):
        merge(weights, lora, 1.0, 2)


@pytest.mark.parametrize("num_modules", [0, 1, 3, 788])
def test_another_number_of_modules_is_refused(
    weights: Tensors, lora: Tensors, num_modules: int
) -> None:
    with pytest.raises(ModelError, match=f"has 2 modules, and must have {num_modules}"):
        merge(weights, lora, 1.0, num_modules)
