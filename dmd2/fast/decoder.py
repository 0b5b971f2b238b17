"""The VAE's decoder with the channels last, in fewer and cheaper passes over its activations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dmd2.fast.group_norm import SplitGroupNorm
from dmd2.fast.twin import drop_divisions, replace, twin

# What of a row of nearest-neighbour upsampling followed by a kernel (a, b, c) reaches an input
# pixel: its neighbours' far sides see c and a, its own two pixels b + c and a + b.
_FOLD = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))
# Logits that exist at once, in float32: 64 MiB.
_MAX_LOGITS = 2**24
# One of 16,384 even weights is 2^-14, below which float16 loses bits; times 2^10 none does.
_LIFT = 2.0**10


def lean_decoder(vae: Any) -> Any:
    """An AutoencoderKL that only decodes: vae's decode, config, dtype and tiling, for inference.

    vae stays as it was. Norms, linear layers, 1x1 kernels and biases are shared with it. The larger
    kernels are copies with the channels last, 100 MB for SDXL's in float16: torch takes the layout
    of a convolution from its input or its weights, so that to lay out vae's own would change what
    it computes. Hence a later change of vae's weights is seen in part only: make another. The lean
    one must not be moved or cast.

    Args:
        vae: diffusers' AutoencoderKL.

    Raises:
        ValueError: vae is something else, or has blocks that this does not know.
    """
    if type(vae) is not AutoencoderKL:
        raise ValueError(f"no lean decoder is known for a {type(vae).__name__}")
    lean = twin(vae)
    lean.encoder = lean.quant_conv = None
    decoder = lean.decoder
    replace(decoder, Attention, ChunkedAttention)
    replace(decoder, Upsample2D, _folded)
    for block in decoder.modules():
        if isinstance(block, ResnetBlock2D):
            _fuse_silu(block)
    if type(decoder.conv_act) is nn.SiLU:
        decoder.conv_norm_out = SplitGroupNorm(decoder.conv_norm_out, silu=True)
        decoder.conv_act = nn.Identity()
    replace(decoder, nn.GroupNorm, SplitGroupNorm)
    drop_divisions(decoder)
    for convolution in decoder.modules():
        if isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d):
            _put_channels_last(convolution)
    return lean


def _fuse_silu(block: ResnetBlock2D) -> None:
    """Let both norms of a block do their SiLU, where the block has no other use of it."""
    if type(block.nonlinearity) is nn.SiLU and block.time_emb_proj is None:
        block.norm1 = SplitGroupNorm(block.norm1, silu=True)
        block.norm2 = SplitGroupNorm(block.norm2, silu=True)
        block.nonlinearity = nn.Identity()


def _put_channels_last(convolution: nn.Conv2d | nn.ConvTranspose2d) -> None:
    weight = convolution.weight
    if not weight.is_contiguous(memory_format=torch.channels_last):  # a 1x1 kernel lies in both
        copy = weight.detach().clone(memory_format=torch.channels_last)
        convolution.weight = nn.Parameter(copy, requires_grad=False)


def _folded(upsample: Upsample2D) -> nn.ConvTranspose2d:
    """Nearest-neighbour upsampling and its 3x3 convolution as one: 4 products an output for 9."""
    convolution = upsample.conv
    if upsample.norm is not None or not _can_fold(convolution) or not upsample.interpolate:
        raise ValueError("an upsampling is not nearest-neighbour and a 3x3 convolution")
    folded = nn.ConvTranspose2d(
        convolution.in_channels,
        convolution.out_channels,
        kernel_size=4,
        stride=2,
        padding=1,
        bias=convolution.bias is not None,
        device="meta",
    )
    folded.weight = nn.Parameter(fold_upsampling(convolution.weight), requires_grad=False)
    folded.bias = convolution.bias
    return folded.train(upsample.training)


def _can_fold(convolution: object) -> bool:
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


class ChunkedAttention(nn.Module):
    """The attention of every pixel to every pixel, with one head, in memory that has a bound.

    At 1024x1024 pixels it is 16,384 tokens of 512 channels, more than flash kernels take in a head.

    Args:
        attention: diffusers' Attention as a VAE has it; its modules are shared.

    Raises:
        ValueError: it has several heads, or other norms, or no residual connection.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        norms = (attention.spatial_norm, attention.norm_q, attention.norm_k)
        is_known = (
            attention.heads == 1
            and attention.residual_connection
            and attention.group_norm is not None
            and attention.to_q.bias is not None
        )
        if not is_known or any(norm is not None for norm in norms):
            raise ValueError("an attention is not a VAE's: one head, a GroupNorm and a residual")
        if attention.rescale_output_factor != 1:
            raise ValueError("an attention rescales its output")
        self.group_norm = attention.group_norm
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out[0]

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The residual sum [B, C, H, W]; temb is None, and there since diffusers passes it."""
        height = hidden_states.shape[2]
        tokens = self.group_norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)
        attended = attend(self._scaled_queries(tokens), self.to_k(tokens), self.to_v(tokens))
        mixed = self.to_out(attended).unflatten(1, (height, -1))
        return hidden_states + mixed.permute(0, 3, 1, 2)

    def _scaled_queries(self, tokens: torch.Tensor) -> torch.Tensor:
        """The queries over sqrt(C), scaled before they are rounded to half precision."""
        scale = tokens.shape[-1] ** -0.5
        bias, weight = self.to_q.bias, self.to_q.weight
        flat = tokens.flatten(0, 1)
        scaled = torch.addmm(bias, flat, weight.T, beta=scale, alpha=scale)
        return scaled.view_as(tokens)


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(queries @ keys^T) @ values, some queries at a time, the softmax in float32.

    Args:
        queries: [B, N, C], already scaled.
        keys, values: [B, N, C] in the queries' dtype.

    Returns:
        [B, N, C] in the queries' dtype.
    """
    num_rows = max(1, _MAX_LOGITS // (keys.shape[0] * keys.shape[1]))
    parts = []
    for some in queries.split(num_rows, dim=1):
        # In half precision logits of 100 would be wrong by 5 %, and past 65,504 infinite.
        weights = _product(some, keys.transpose(1, 2)).softmax(-1)
        lifted = torch.mul(weights, _LIFT, out=torch.empty_like(weights, dtype=values.dtype))
        parts.append((_product(lifted, values) / _LIFT).to(values.dtype))
    return torch.cat(parts, dim=1)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The batched product in float32 at least, as tensor cores sum it."""
    if a.is_cuda and a.dtype.itemsize < torch.float32.itemsize:
        return torch.bmm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.bmm(a.to(dtype), b.to(dtype))
