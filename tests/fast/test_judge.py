"""The judge: what is within rounding passes, and nothing else does."""

from __future__ import annotations

import math

import pytest
import torch

from dmd2.fast.judge import Limits, judge, limits_for
from dmd2.fast.ways import Facts, Part

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARTS: tuple[Part, ...] = ("step", "decode")


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random, and as smooth as pictures are: [1, 3, 64, 64] in -1..1."""
    coarse = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(-1, 1).to(dtype)


def off_by(plain: torch.Tensor, share: float) -> torch.Tensor:
    """Plain and noise whose norm is a share of plain's; in float64, so that nothing rounds it."""
    noise = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).double()
    return plain.double() + share * plain.double().norm() * noise / noise.norm()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_twice_the_tolerance_is_refused_and_half_of_it_passes(
    part: Part, dtype: torch.dtype
) -> None:
    plain, limits = images(dtype), limits_for(Facts(CPU, dtype))
    far = judge(part, [plain, plain], [plain, off_by(plain, 2 * limits.error)], limits)
    assert far.error == pytest.approx(2 * limits.error, rel=1e-3)
    assert "too far from plain" in str(far.problem)
    near = judge(part, [plain, plain], [plain, off_by(plain, limits.error / 2)], limits)
    assert near.error == pytest.approx(limits.error / 2, rel=1e-3)
    assert near.problem is None


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_enough(wrong: float) -> None:
    plain = images()
    way = plain.clone()
    way[0, 1, 2, 3] = wrong
    limits = limits_for(Facts(CPU, torch.float32))
    assert judge("step", [plain], [way], limits).problem == "is not finite"
    assert "plain is not finite" in str(judge("step", [way], [way], limits).problem)


def test_another_shape_is_refused() -> None:
    verdict = judge("step", [images()], [images()[:, :2]], limits_for(Facts(CPU, torch.float32)))
    assert verdict.problem == "returned [1, 2, 64, 64] in place of [1, 3, 64, 64]"


def test_float16_is_summed_without_overflow() -> None:
    plain = torch.full((1, 4, 64, 64), 6e4, dtype=torch.float16)
    verdict = judge("step", [plain], [plain], limits_for(Facts(CPU, torch.float16)))
    assert (verdict.error, verdict.problem) == (0, None)


def test_where_plain_is_zero_a_way_has_to_be() -> None:
    zero, limits = torch.zeros(1, 4, 8, 8), limits_for(Facts(CPU, torch.float32))
    assert judge("step", [zero], [zero.clone()], limits).problem is None
    assert judge("step", [zero], [zero + 1e-30], limits).problem is not None


def test_pixels_are_looked_at_where_the_norm_sees_nothing() -> None:
    """A few spots, and a slight tint, as small in norm as rounding."""
    plain, limits = images(), Limits(error=0.1, mean=0.15, most=3)
    spotted, tinted = plain.clone(), plain + 0.5 * 2 / 255
    spotted[..., :3, :3] -= plain[..., :3, :3].sign() * 8 / 255
    for way, said in ((spotted, "up to 4"), (tinted, "on average")):
        assert judge("step", [plain], [way], limits).problem is None
        assert said in str(judge("decode", [plain], [way], limits).problem)


def test_tf32_has_float16s_limits_and_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    half = limits_for(Facts(CPU, torch.float16))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert limits_for(Facts(CUDA, torch.float32)) == half
    assert limits_for(Facts(CPU, torch.float32)) != half
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert limits_for(Facts(CUDA, torch.float32)) == limits_for(Facts(CPU, torch.float32))
    assert not torch.backends.cudnn.allow_tf32
