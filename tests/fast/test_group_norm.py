"""The split GroupNorm: as near to float64 as ATen's, in the input's dtype and layout."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import error
from torch import nn
from torch.nn import functional

from dmd2.fast import group_norm
from dmd2.fast.group_norm import SplitGroupNorm

pytestmark = pytest.mark.usefixtures("for_inference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = ("contiguous", "channels last", "transposed", "a part")


def a_norm(dtype: torch.dtype, groups: int = 4, channels: int = 24) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    generator = torch.Generator().manual_seed(channels)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(channels, generator=generator))
    return norm.to(dtype).requires_grad_(False)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":  # as diffusers' attention gives [B, C, N]
        return x.flatten(2).mT.contiguous().mT
    return torch.cat([x, x], dim=3)[..., : x.shape[3]] if layout == "a part" else x


def assert_rounded_once(
    result: torch.Tensor, reference: torch.Tensor, arithmetic: float = 1e-6
) -> None:
    """Hardly farther from float64's result than that is when rounded to the result's dtype."""
    rounding = error(reference.to(result.dtype), reference)
    assert error(result, reference) < 1.1 * rounding + arithmetic


def in_float64(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(norm).double()(x.double().contiguous())


def batch_norm_elemt(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor,
) -> None:
    """What torch has on CUDA alone; its statistics have to be contiguous there, in float32."""
    assert len(x) == 1
    assert mean.is_contiguous()
    assert rstd.is_contiguous()
    assert mean.dtype == rstd.dtype == torch.promote_types(x.dtype, torch.float32)
    weight, bias, mean, rstd = (each.view(1, -1, 1, 1) for each in (weight, bias, mean, rstd))
    out.copy_((x - mean) * rstd * weight + bias)


@pytest.fixture(autouse=True, params=["welford", "about the mean", "batch norm"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways to the variance and to the result, CUDA's and the CPU's; nothing left to ATen."""
    monkeypatch.setattr(group_norm, "LEFT_TO_ATEN", {})
    if request.param != "about the mean":
        monkeypatch.setattr(group_norm, "about_the_mean", group_norm.by_welford)
    if request.param == "batch norm":
        suits = lambda x: x.ndim == 4 and x.stride(1) == 1  # noqa: E731
        monkeypatch.setattr(group_norm, "_suits_batch_norm", suits)
        monkeypatch.setattr(torch, "batch_norm_elemt", batch_norm_elemt)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_it_equals_float64_and_keeps_dtype_and_layout(
    dtype: torch.dtype, layout: str, batch: int
) -> None:
    norm = a_norm(dtype)
    x = laid_out((noise(batch, 24, 9, 13) * 3 + 1).to(dtype), layout)
    before = x.clone()
    result = SplitGroupNorm(norm)(x)
    assert result.dtype == dtype
    assert result.stride() == torch.empty_like(x).stride()
    assert_rounded_once(result, in_float64(norm, x), 1e-14 if dtype == torch.float64 else 1e-6)
    assert x.equal(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_large_mean_leaves_the_differences(dtype: torch.dtype, layout: str) -> None:
    """1000 and a little noise, which half precision rounds away before we see it."""
    norm = a_norm(dtype)
    x = laid_out((noise(2, 24, 16, 20) + 1000).to(dtype), layout)
    # An ulp of 1000 in float32 is 6e-5 of the noise.
    assert_rounded_once(SplitGroupNorm(norm)(x), in_float64(norm, x), 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_half_precision_does_not_overflow_or_vanish(layout: str, scale: float) -> None:
    """Squares of such numbers are no numbers of float16."""
    norm = a_norm(torch.float16)
    x = laid_out((noise(2, 24, 16, 20) * scale).half(), layout)
    assert_rounded_once(SplitGroupNorm(norm)(x), in_float64(norm, x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_means_that_differ_by_channel_are_a_group_s_variance(layout: str) -> None:
    norm = a_norm(torch.float32)
    apart = torch.arange(24.0)[None, :, None, None] * 50
    x = laid_out(noise(2, 24, 9, 13) + apart, layout)
    assert error(SplitGroupNorm(norm)(x), in_float64(norm, x)) < 2e-6


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("shape", [(2, 24, 1, 1), (1, 24, 7), (1, 24, 3, 4, 5), (1, 24, 64, 1)])
def test_any_groups_and_any_rank(groups: int, shape: tuple[int, ...]) -> None:
    norm, x = a_norm(torch.float32, groups), noise(*shape) * 2
    result, reference = SplitGroupNorm(norm)(x), in_float64(norm, x)
    assert (result - reference).abs().max() < 1e-5


def test_a_constant_becomes_the_bias() -> None:
    norm = a_norm(torch.float32)
    result = SplitGroupNorm(norm)(torch.full((1, 24, 4, 4), 7.0))
    assert torch.allclose(result, norm.bias[None, :, None, None].expand_as(result), atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    x = noise(2, 24, 9, 13)
    x[1, 5, 2, 2] = bad
    result = SplitGroupNorm(a_norm(torch.float32))(x)
    assert result[0].isfinite().all()
    assert not result[1, :6].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_silu_is_done_on_the_way(layout: str) -> None:
    norm, x = a_norm(torch.float32), laid_out(noise(2, 24, 9, 13), layout)
    assert SplitGroupNorm(norm, silu=True)(x).equal(functional.silu(SplitGroupNorm(norm)(x)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_an_offset_counts_as_if_it_were_added(dtype: torch.dtype, layout: str) -> None:
    norm, offset = a_norm(dtype), torch.linspace(-30, 30, 24)
    x = laid_out(noise(2, 24, 9, 13).to(dtype), layout)
    whole = x.double() + offset.double().view(1, 24, *(1,) * (x.ndim - 2))
    result = SplitGroupNorm(norm, offset=offset)(x)
    assert_rounded_once(result, in_float64(norm, whole))
    assert result.stride() == torch.empty_like(x).stride()


def test_it_shares_the_weights_and_stays_a_group_norm() -> None:
    norm = a_norm(torch.float32)
    split_norm = SplitGroupNorm(norm)
    assert split_norm.weight is norm.weight
    assert split_norm.bias is norm.bias
    assert isinstance(split_norm, nn.GroupNorm)
    assert split_norm.state_dict().keys() == norm.state_dict().keys()


def test_without_weights_it_is_refused() -> None:
    with pytest.raises(ValueError, match="without weight and bias"):
        SplitGroupNorm(nn.GroupNorm(4, 24, affine=False))


@pytest.mark.parametrize(("longest", "is_split"), [(54, False), (53, True)])
def test_short_contiguous_rows_are_left_to_aten(
    longest: int, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_norm, "LEFT_TO_ATEN", {"cpu": longest})
    calls = []
    moments = group_norm._moments
    monkeypatch.setattr(group_norm, "_moments", lambda *a: calls.append(a) or moments(*a))
    norm, x = a_norm(torch.float32), noise(2, 24, 3, 3)
    SplitGroupNorm(norm)(x)
    assert bool(calls) == is_split
    SplitGroupNorm(norm)(laid_out(x, "channels last"))
    assert len(calls) == 1 + is_split
