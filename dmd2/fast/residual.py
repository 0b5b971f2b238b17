"""The decoder's convolutions with the channels last, and their biases out of the activations' way.

cuDNN adds a bias in one more pass over what a convolution wrote. Most of the decoder's biases are
followed by nothing but sums and GroupNorms, whose means can take them: they are carried along as
one number a channel, until an upsampling, at whose borders they would not be constant.
"""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dmd2.fast.group_norm import SplitGroupNorm

# What of a row of nearest-neighbour upsampling followed by a kernel (a, b, c) reaches an input
# pixel: its neighbours' far sides see c and a, its own two pixels b + c and a + b.
_FOLD = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def put_channels_last(convolution: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Give a convolution a copy of its weight with the channels last; a 1x1 kernel lies so."""
    weight = convolution.weight
    if not weight.is_contiguous(memory_format=torch.channels_last):
        copy = weight.detach().clone(memory_format=torch.channels_last)
        convolution.weight = nn.Parameter(copy, requires_grad=False)


def take_bias(convolution: nn.Conv2d | nn.ConvTranspose2d) -> torch.Tensor:
    """The bias [C] in float32 at least, which the convolution no longer has."""
    bias, weight = convolution.bias, convolution.weight
    convolution.bias = None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if bias is None:
        return torch.zeros(convolution.out_channels, dtype=dtype, device=weight.device)
    return bias.detach().to(dtype, copy=True)


class ResidualBlock(nn.Module):
    """A residual block without time embedding, whose biases its norms take or it hands on.

    Args:
        block: diffusers' ResnetBlock2D; loses the biases of its convolutions, which are used here.
        offset: [C], what the input lacks by channel, in float32 at least.

    Raises:
        ValueError: it has a time embedding, resamples, rescales or has an activation but SiLU.

    Attributes:
        lacks: [C], what the output lacks by channel.
    """

    lacks: torch.Tensor

    def __init__(self, block: ResnetBlock2D, offset: torch.Tensor) -> None:
        super().__init__()
        resamples = block.upsample is not None or block.downsample is not None
        if block.time_emb_proj is not None or resamples or block.output_scale_factor != 1:
            raise ValueError("a residual block is not a VAE's")
        if type(block.nonlinearity) is not nn.SiLU:
            raise ValueError(f"no {type(block.nonlinearity).__name__} is known, but only SiLU")
        self.norm1 = SplitGroupNorm(block.norm1, silu=True, offset=offset)
        self.conv1 = block.conv1
        self.norm2 = SplitGroupNorm(block.norm2, silu=True, offset=take_bias(block.conv1))
        self.conv2 = block.conv2
        self.conv_shortcut = block.conv_shortcut
        if block.conv_shortcut is not None:
            matrix = block.conv_shortcut.weight.detach().flatten(1).to(offset.dtype)
            offset = matrix @ offset + take_bias(block.conv_shortcut)
        self.register_buffer("lacks", offset + take_bias(block.conv2), persistent=False)

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, C, H, W]; temb is None, and there since diffusers passes it."""
        shortcut = hidden_states
        hidden_states = self.conv1(self.norm1(hidden_states))
        hidden_states = self.conv2(self.norm2(hidden_states))
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        return hidden_states.add_(shortcut)


class FoldedUpsampling(nn.ConvTranspose2d):
    """Nearest-neighbour upsampling and its 3x3 convolution as one: 4 products an output for 9.

    Args:
        upsampling: diffusers' Upsample2D; its convolution loses its bias.
        offset: [C], what the input lacks by channel, which is added here.

    Raises:
        ValueError: it is another upsampling.

    Attributes:
        lacks: [C], what the output lacks by channel.
    """

    offset: torch.Tensor
    lacks: torch.Tensor

    def __init__(self, upsampling: Upsample2D, offset: torch.Tensor) -> None:
        convolution = upsampling.conv
        if upsampling.norm is not None or not upsampling.interpolate or not _folds(convolution):
            raise ValueError("an upsampling is not nearest-neighbour and a 3x3 convolution")
        channels = convolution.in_channels, convolution.out_channels
        super().__init__(*channels, 4, stride=2, padding=1, bias=False, device="meta")
        self.weight = nn.Parameter(fold_upsampling(convolution.weight), requires_grad=False)
        settled = offset.to(self.weight.dtype).view(-1, 1, 1)
        self.register_buffer("offset", settled, persistent=False)
        self.register_buffer("lacks", take_bias(convolution), persistent=False)

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """[B, C, H, W] to [B, C', 2 H, 2 W]."""
        return super().forward(input + self.offset, output_size)


def _folds(convolution: object) -> bool:
    return (
        type(convolution) is nn.Conv2d
        and (convolution.kernel_size, convolution.stride) == ((3, 3), (1, 1))
        and (convolution.padding, convolution.dilation) == ((1, 1), (1, 1))
        and (convolution.groups, convolution.padding_mode) == (1, "zeros")
    )


def fold_upsampling(weight: torch.Tensor) -> torch.Tensor:
    """The kernel of a transposed convolution that upsamples by 2, nearest neighbour, and convolves.

    Output 2i of a row is a x[i-1] + (b + c) x[i], and 2i + 1 is (a + b) x[i] + c x[i+1]. A
    transposed convolution with kernel t, stride 2 and padding 1 gives t[3] x[i-1] + t[1] x[i] and
    t[2] x[i] + t[0] x[i+1]. Both take x as zero beyond its borders, so they agree there too.

    Args:
        weight: of a convolution with padding 1, [out, in, 3, 3], any float dtype.

    Returns:
        [in, out, 4, 4] in weight's dtype, summed in float32 at least and rounded once.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    fold = torch.tensor(_FOLD, dtype=dtype, device=weight.device)
    folded = fold @ weight.detach().to(dtype) @ fold.T
    return folded.transpose(0, 1).to(weight.dtype)
