"""What LoRAs add to weights: numbers by hand, one rounding, and nothing else touched."""

from __future__ import annotations

import pytest
import torch

from dmd2.errors import LoraError
from dmd2.loras.delta import WeightDelta, merge


def rank_one(number: float, factor: float = 1.0) -> WeightDelta:
    """A LoRA that adds number * factor to a 1x1 weight."""
    return WeightDelta({"down": torch.tensor([[number]]), "up": torch.ones(1, 1)}, factor)


def test_numbers_worked_out_by_hand() -> None:
    weights = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    down, up = torch.tensor([[1.0, 10.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    # scale 0.5 and alpha / rank = 1 / 2, so a quarter of [[2, 20], [0, 4]].
    merged = merge(weights, [({"a": WeightDelta({"down": down, "up": up}, 0.5)}, 0.5)])
    assert torch.equal(merged["a"], torch.tensor([[1.5, 7.0], [3.0, 5.0]]))


def test_dora_worked_out_by_hand() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    change = {"diff": torch.tensor([[0.0, 4.0], [0.0, 0.0]])}
    # W + product is [[3, 4], [0, 2]]: rows of norms 5 and 2, columns of norms 3 and sqrt(20).
    by_output = WeightDelta(change, magnitude=torch.tensor([[10.0], [1.0]])).delta(weight)
    assert torch.allclose(weight + by_output, torch.tensor([[6.0, 8.0], [0.0, 1.0]]))
    by_input = WeightDelta(change, magnitude=torch.tensor([[6.0, 20**0.5]])).delta(weight)
    assert torch.allclose(weight + by_input, torch.tensor([[6.0, 4.0], [0.0, 2.0]]))


def test_doras_scale_is_outside_of_the_norm() -> None:
    """At 0 the weight is what it was, whatever its norm, and between that is linear."""
    weight = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    delta = WeightDelta({"diff": torch.ones(2, 2)}, magnitude=torch.tensor([[10.0], [1.0]]))
    whole, half, none = (merge({"a": weight}, [({"a": delta}, s)])["a"] for s in (1.0, 0.5, 0.0))
    assert torch.equal(none, weight)
    assert torch.allclose(half, (weight + whole) / 2)
    assert not torch.allclose(whole, weight)


def test_a_row_of_zeros_has_a_direction_of_zeros() -> None:
    weight = torch.zeros(1, 2)
    delta = WeightDelta({"diff": torch.zeros(1, 2)}, magnitude=torch.ones(1, 1))
    assert torch.equal(delta.delta(weight), weight)


def test_several_are_added_to_the_same_weight() -> None:
    """Each sees the weight without the others, so that their order does not matter."""
    weight = torch.tensor([[3.0, 4.0]])
    dora = WeightDelta({"diff": torch.zeros(1, 2)}, magnitude=torch.tensor([[10.0]]))
    plain = WeightDelta({"diff": torch.tensor([[1.0, 1.0]])})
    loras = [({"a": plain}, -2.0), ({"a": dora}, 1.0)]
    for order in (loras, loras[::-1]):
        assert torch.allclose(merge({"a": weight}, order)["a"], torch.tensor([[4.0, 6.0]]))


def test_a_merged_convolution_is_the_two_convolutions_in_a_row() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, down, up, image = (
        torch.randn(*shape, generator=generator)
        for shape in ((5, 3, 3, 3), (2, 3, 3, 3), (5, 2, 1, 1), (1, 3, 8, 8))
    )
    conv2d = torch.nn.functional.conv2d
    expected = conv2d(image, weight, padding=1)
    expected += 0.5 * 1.5 * conv2d(conv2d(image, down, padding=1), up)
    merged = merge({"a": weight}, [({"a": WeightDelta({"down": down, "up": up}, 1.5)}, 0.5)])
    torch.testing.assert_close(
        conv2d(image, merged["a"], padding=1), expected, rtol=1e-4, atol=1e-5
    )


def test_only_what_is_touched_is_returned_and_nothing_is_written_to() -> None:
    weights = {name: torch.ones(1, 1) for name in "abc"}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    merged = merge(weights, [({"a": rank_one(1)}, 1.0), ({"b": rank_one(2), "a": rank_one(4)}, -1)])
    assert {name: tensor.item() for name, tensor in merged.items()} == {"a": -2.0, "b": -1.0}
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert merge(weights, []) == {}
    zero = merge(weights, [({"a": rank_one(1)}, 0.0)])["a"]
    assert zero.data_ptr() != weights["a"].data_ptr()


def test_half_weights_are_summed_in_float32_and_rounded_once() -> None:
    """A unit in the last place of 1 is 2**-10; two thirds of one are lost if rounded in between."""
    for dtype, unit in ((torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)):
        weights = {"a": torch.ones(1, 1, dtype=dtype)}
        third = ({"a": rank_one(unit / 3)}, 1.0)
        merged = merge(weights, [third, third])["a"]
        assert merged.dtype == dtype
        assert merged.item() == 1 + unit


def test_half_loras_are_multiplied_in_float32() -> None:
    tiny = torch.full((1, 1), 2.0**-13, dtype=torch.float16)
    # up @ down is 2**-26, which half rounds to 0.
    delta = WeightDelta({"down": tiny, "up": tiny}, 2.0**15).delta(torch.ones(1, 1))
    assert delta.dtype == torch.float32
    assert delta.item() == 2.0**-11


@pytest.mark.parametrize(
    ("dtype", "number"),
    [(torch.float16, 65_520), (torch.bfloat16, 3.4e38), (torch.float32, 3.4e38)],
)
def test_what_overflows_is_refused(dtype: torch.dtype, number: float) -> None:
    weights = {name: torch.full((1, 1), number / 2).to(dtype) for name in ("small", "large")}
    deltas = {"small": rank_one(0.0), "large": rank_one(number / 2)}
    with pytest.raises(LoraError, match=rf"large is more than {str(dtype)[6:]} can hold"):
        merge(weights, [(deltas, 1.0 if dtype == torch.float16 else 3.0)])
    assert merge(weights, [(deltas, 0.1)])["large"].isfinite().all()
