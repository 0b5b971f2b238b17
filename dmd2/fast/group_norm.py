"""GroupNorm in reductions that fill a GPU.

ATen's CUDA kernel reduces each (image, group) in one thread block: 32 blocks for one image of
SDXL, on GPUs of 40 to 150 multiprocessors. torch's own reductions split a long row over as many
blocks as the GPU takes.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

# The longest row, which is a group of one image, whose norm is left to ATen, by the kind of device;
# contiguous inputs only. The CPU's kernel has no such flaw. On CUDA a block is estimated to take as
# long for 2^16 elements as a split norm for its launches, which are six more.
LEFT_TO_ATEN = {"cpu": math.inf, "cuda": 2**16}


class SplitGroupNorm(nn.GroupNorm):
    """The GroupNorm that it is made from, on the same weight and bias, for inference only.

    A GroupNorm by class too, since diffusers asks some of its norms what they are.

    Args:
        norm: stays as it was.
        silu: whether SiLU follows, done in place.
        offset: [C], what is yet to be added to each channel of the input, and is accounted for
            without doing so; None is nothing.

    Raises:
        ValueError: norm has no weight and bias.
    """

    offset: torch.Tensor | None

    def __init__(
        self, norm: nn.GroupNorm, silu: bool = False, offset: torch.Tensor | None = None
    ) -> None:
        if norm.weight is None or norm.bias is None:
            raise ValueError("a GroupNorm without weight and bias cannot be split")
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        self.weight, self.bias = norm.weight, norm.bias
        self.silu = silu
        self.register_buffer("offset", offset, persistent=False)
        self.train(norm.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The normalised input, in its dtype and its layout.

        Args:
            input: [B, C, ...] in any float dtype, B above 0; contiguous or with the channels last.
                The sums are taken in float32 at least.
        """
        normalise = super().forward if self._is_left_to_aten(input) else self._split
        normalised = normalise(input)
        return functional.silu(normalised, inplace=True) if self.silu else normalised

    def _is_left_to_aten(self, x: torch.Tensor) -> bool:
        if self.offset is not None or (x.ndim > 2 and x.stride(1) == 1):
            # With the channels last ATen gives another layout on CUDA, and on the CPU a result that
            # is wrong by 20 % for a mean of a thousand standard deviations.
            return False
        row = x.numel() // (x.shape[0] * self.num_groups)
        return row <= LEFT_TO_ATEN.get(x.device.type, 0)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        mean, variance = _moments(x, self.num_groups, self.offset)
        # In float32 as in ATen: rounded to half precision a mean, or a shift, would lose the small
        # differences of large numbers.
        rstd = variance.add_(self.eps).rsqrt_()
        if _suits_batch_norm(x):
            return self._by_batch_norm(x, mean, rstd)
        scale = self.weight.view(self.num_groups, -1) * rstd
        bias = self.bias.view(self.num_groups, -1)
        shift = torch.addcmul(bias, mean, scale, value=-1)
        if self.offset is not None:
            shift = shift.addcmul_(self.offset.view(self.num_groups, -1), scale)
        a_channel = (x.shape[0], self.num_channels, *(1,) * (x.ndim - 2))
        # Written straight into x's dtype and layout; float32 would be written and read once more.
        out = torch.empty_like(x)
        return torch.addcmul(shift.view(a_channel), x, scale.view(a_channel), out=out)

    def _by_batch_norm(
        self, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
    ) -> torch.Tensor:
        """The affine pass by CUDA's batch norm, image by image, since it knows channels alone.

        It computes in float32 too. On an H200, of a float16 [1, 128, 1024, 1024]: 0.20 ms, where a
        broadcast addcmul takes 0.35.
        """
        in_channels = (x.shape[0], self.num_groups, self.num_channels // self.num_groups)
        mean, rstd = (each.expand(in_channels).flatten(1).contiguous() for each in (mean, rstd))
        if self.offset is not None:
            mean = mean - self.offset
        out = torch.empty_like(x)
        for i in range(len(x)):
            image, normalised = x[i : i + 1], out[i : i + 1]
            torch.batch_norm_elemt(
                image, self.weight, self.bias, mean[i], rstd[i], self.eps, out=normalised
            )
        return out


def _suits_batch_norm(x: torch.Tensor) -> bool:
    """On a CPU torch has no such function; with the channels first nothing was measured."""
    return x.is_cuda and x.ndim == 4 and x.stride(1) == 1


def _moments(
    x: torch.Tensor, num_groups: int, offset: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and variance of x + offset by group, [B, num_groups, 1], in float32 at least."""
    num_images = x.shape[0]
    of_rows = by_welford if x.is_cuda else about_the_mean
    if x.stride(1) != 1 and offset is None:
        mean, variance = of_rows(x.reshape(num_images, num_groups, -1), -1)
        return mean.unsqueeze(-1), variance.unsqueeze(-1)
    # Channels last: a group's few channels are a small part of each line of memory that a reduction
    # reads, but all the channels of a pixel are one piece. So channel by channel first, and of each
    # row of the image, so that there are enough sums for all of a GPU: 0.14 ms for the variance of
    # the above on an H200, and 0.53 at once. As many rows as there are were near the best number.
    mean, variance = of_rows(x.movedim(1, -1), -2)
    mean = mean if offset is None else mean.add_(offset)
    mean, variance = (
        part.view(num_images, -1, num_groups, part.shape[-1] // num_groups)
        for part in (mean, variance)
    )
    between, mean_of_group = torch.var_mean(mean, (1, 3), correction=0)
    return mean_of_group.unsqueeze(-1), (variance.mean((1, 3)) + between).unsqueeze(-1)


# A mean of squares less the square of the mean would be one pass fewer, and wrong by 6 % where the
# mean is a thousand standard deviations.


def by_welford(rows: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and variance over a dimension, in float32 at least, with nothing stored.

    Welford's algorithm, as torch's variance has it: on the CPU it takes ten times a GroupNorm.
    """
    if rows.dtype.itemsize >= torch.float32.itemsize:
        variance, mean = torch.var_mean(rows, dim, correction=0)
        return mean, variance
    # var_mean would round both to half precision; each of these reads it and sums in float32.
    out = rows.new_empty(0, dtype=torch.float32)
    variance = torch.var(rows, dim, correction=0, out=out)
    return rows.mean(dim, dtype=torch.float32), variance


def about_the_mean(rows: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in vectorised passes over a copy in float32, or float64 for such rows."""
    mean = rows.mean(dim, dtype=torch.promote_types(rows.dtype, torch.float32), keepdim=True)
    return mean.squeeze(dim), (rows - mean).square_().mean(dim)
