"""GroupNorm in reductions that fill a GPU.

ATen's CUDA kernel reduces each (image, group) in one thread block: 32 blocks for one image of
SDXL, on GPUs of 40 to 150 multiprocessors. torch's own reductions split a long row over as many
blocks as the GPU takes.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

# The kinds of device whose GroupNorm is replaced. ATen's for the CPU has no such flaw, and it
# keeps the layout, while torch's variance there takes ten times as long as all of it.
SPLIT_ON = frozenset({"cuda"})


class SplitGroupNorm(nn.GroupNorm):
    """The GroupNorm that it is made from, on the same weight and bias, for inference only.

    A GroupNorm by class too, since diffusers asks some of its norms what they are.

    Args:
        norm: stays as it was.
        silu: whether SiLU follows, done in place.

    Raises:
        ValueError: norm has no weight and bias.
    """

    def __init__(self, norm: nn.GroupNorm, silu: bool = False) -> None:
        if norm.weight is None or norm.bias is None:
            raise ValueError("a GroupNorm without weight and bias cannot be split")
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        self.weight, self.bias = norm.weight, norm.bias
        self.silu = silu
        self.train(norm.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The normalised input, in its dtype and its layout.

        Args:
            input: [B, C, ...] in any float dtype; contiguous or with the channels last. The sums
                are taken in float32 at least.
        """
        if input.device.type in SPLIT_ON and input.ndim > 2:
            normalised = self._split(input)
        else:
            normalised = self._by_aten(input)
        return functional.silu(normalised, inplace=True) if self.silu else normalised

    def _by_aten(self, x: torch.Tensor) -> torch.Tensor:
        # Of three dimensions ATen would not see that the channels come last.
        whole = x.unsqueeze(-1) if x.ndim == 3 else x
        normalised = functional.group_norm(whole, self.num_groups, self.weight, self.bias, self.eps)
        return normalised.view_as(x) if x.ndim != 3 else normalised.squeeze(-1)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        mean, variance = _moments(x, self.num_groups)
        # One scale and one shift a channel, in float32 as in ATen: rounded to half precision they
        # would lose the small differences of large numbers.
        scale = self.weight.view(self.num_groups, -1) * (variance + self.eps).rsqrt()
        bias = self.bias.view(self.num_groups, -1)
        shift = torch.addcmul(bias, mean, scale, value=-1)
        a_channel = (x.shape[0], self.num_channels, *(1,) * (x.ndim - 2))
        # Written straight into x's dtype and layout; float32 would be written and read once more.
        out = torch.empty_like(x)
        return torch.addcmul(shift.view(a_channel), x, scale.view(a_channel), out=out)


def _moments(x: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each group's mean and variance about it, [B, num_groups, 1], in float32 at least."""
    num_images = x.shape[0]
    if x.stride(1) != 1:
        rows = x.reshape(num_images, num_groups, -1)
        mean, variance = _mean_and_variance(rows)
        return mean.unsqueeze(-1), variance.unsqueeze(-1)
    # Channels last: a group's few channels are a small part of each line of memory that a reduction
    # reads, but all the channels of a pixel are one piece. So channel by channel first.
    mean, variance = (
        each.view(num_images, num_groups, -1) for each in _mean_and_variance(x.flatten(2))
    )
    between, group_mean = torch.var_mean(mean, -1, correction=0, keepdim=True)
    return group_mean, variance.mean(-1, keepdim=True) + between


def _mean_and_variance(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and variance of the last dimension, in float32 at least.

    The variance is torch's, by Welford's algorithm: a mean of squares less the square of the mean
    is wrong by 6 % where the mean is a thousand standard deviations.
    """
    if rows.dtype.itemsize >= torch.float32.itemsize:
        variance, mean = torch.var_mean(rows, -1, correction=0)
        return mean, variance
    # var_mean would round both to half precision; these two read it and sum in float32.
    out = rows.new_empty(0, dtype=torch.float32)
    variance = torch.var(rows, -1, correction=0, out=out)
    return rows.mean(-1, dtype=torch.float32), variance
