"""Whether what a way returns is what the plain model returns, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmd2.fast.ways import Facts, Part
from dmd2.models import vae


@dataclass(frozen=True)
class Limits:
    """How far an exact way may be from plain.

    Attributes:
        error: of |way - plain| / |plain|, in norm.
        mean: of the decoded pixels' differences, on average, in steps of 1/255.
        most: what 99.9 % of them are not above.
    """

    error: float
    mean: float
    most: float


# float16's: on an H200 (SDXL's shape, random weights, 1024x1024) plain is 1.4e-3 from float32 at
# the first timestep, 0.8e-3 at the last and 1.4e-3 in a decode; the lean way is a little nearer, at
# most 1.7e-3 from plain, and its pixels 0.055 on average and 1 for 99.9 %. bfloat16 has 8 times
# float16's rounding; no card has said how far off it is. float32's pixels differ where a value lies
# at the border between two bytes.
_LIMITS = {
    torch.float32: Limits(1e-5, 0.01, 1),
    torch.float16: Limits(3e-3, 0.15, 3),
    torch.bfloat16: Limits(2e-2, 1.2, 24),
}


@dataclass(frozen=True)
class Verdict:
    """What came of comparing a way with plain.

    Attributes:
        error: the largest of all calls; NaN where they cannot be compared.
        problem: None where the way passes, else what is wrong.
    """

    error: float
    problem: str | None


def limits_for(facts: Facts) -> Limits:
    """The limits for a model.

    torch lets cuDNN's convolutions of float32 run in TF32 by default, and nothing here changes
    that: plain and way are compared under the same flags. TF32 has float16's mantissa, so that two
    orders of the same additions are as far apart, and float16's limits hold.
    """
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    if facts.device.type == "cuda" and facts.dtype == torch.float32 and tf32:
        return _LIMITS[torch.float16]
    return _LIMITS[facts.dtype]


def judge(
    part: Part, plain: Sequence[torch.Tensor], way: Sequence[torch.Tensor], limits: Limits
) -> Verdict:
    """Compare what both return for the same inputs, call by call.

    Args:
        part: of a "decode" the pixels are compared too.
        plain: the UNet's noise or the decoder's images in -1..1, each [B, C, H, W].
        way: the same of the way.
        limits: that the way has to keep.
    """
    verdicts = [_judge_one(part, *pair, limits) for pair in zip(plain, way, strict=True)]
    problem = next((verdict.problem for verdict in verdicts if verdict.problem), None)
    return Verdict(max((verdict.error for verdict in verdicts), default=math.nan), problem)


def _judge_one(part: Part, plain: torch.Tensor, way: torch.Tensor, limits: Limits) -> Verdict:
    if plain.shape != way.shape:
        return Verdict(math.nan, f"returned {list(way.shape)} in place of {list(plain.shape)}")
    if not plain.isfinite().all():
        return Verdict(math.nan, "cannot be judged: plain is not finite here")
    if not way.isfinite().all():
        return Verdict(math.nan, "is not finite")
    error = _relative_error(plain, way)
    if not error <= limits.error:
        return Verdict(error, f"is too far from plain: at most {limits.error:.0e} will do")
    if part == "decode":
        mean, most = _pixel_differences(plain, way)
        if mean > limits.mean or most > limits.most:
            return Verdict(
                error,
                f"changes pixels by {mean:.3f}/255 on average and up to {most:g}: "
                f"at most {limits.mean:g} and {limits.most:g} will do",
            )
    return Verdict(error, None)


def _relative_error(plain: torch.Tensor, way: torch.Tensor) -> float:
    """|way - plain| / |plain| in float64, which the sum of squares of float16 needs."""
    exact = plain.double()
    norm = float(exact.norm())
    distance = float((way.double() - exact).norm())
    if norm == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / norm


def _pixel_differences(plain: torch.Tensor, way: torch.Tensor) -> tuple[float, float]:
    """The mean, and what 99.9 % are not above, in steps of 1/255."""
    pixels, others = (vae.to_uint8(images.float()).int() for images in (plain, way))
    differences = (pixels - others).abs().flatten().float()
    rank = math.ceil(0.999 * differences.numel())
    return float(differences.mean()), float(differences.kthvalue(rank).values)
