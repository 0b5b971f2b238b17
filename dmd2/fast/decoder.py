"""The VAE's decoder with the channels last, in fewer and cheaper passes over its activations."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dmd2.fast.attention import ChunkedAttention
from dmd2.fast.group_norm import SplitGroupNorm
from dmd2.fast.residual import FoldedUpsampling, ResidualBlock, put_channels_last, take_bias
from dmd2.fast.twin import twin


def lean_decoder(vae: Any) -> Any:
    """An AutoencoderKL that only decodes: vae's decode, config, dtype and tiling, for inference.

    vae stays as it was. Norms, linear layers and 1x1 kernels are shared with it. The larger
    kernels are copies with the channels last, 100 MB for SDXL's in float16: torch takes the layout
    of a convolution from its input or its weights, so that to lay out vae's own would change what
    it computes. Hence a later change of vae's weights is seen in part only: make another. The lean
    one must not be moved or cast.

    Args:
        vae: diffusers' AutoencoderKL, as it is to be decoded with: in tiles or not.

    Raises:
        ValueError: vae is something else, or has blocks that this does not know.
    """
    if type(vae) is not AutoencoderKL:
        raise ValueError(f"no lean decoder is known for a {type(vae).__name__}")
    lean = twin(vae)
    lean.encoder = lean.quant_conv = None
    _rewrite(lean.decoder)
    for convolution in lean.decoder.modules():
        if isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d):
            put_channels_last(convolution)
    return lean


def _rewrite(decoder: Any) -> None:
    """Replace what is in diffusers' Decoder, in the order that it runs in."""
    offset = take_bias(decoder.conv_in)
    for block in (decoder.mid_block, *decoder.up_blocks):
        offset = _rewrite_block(block, offset)
    decoder.conv_norm_out = SplitGroupNorm(decoder.conv_norm_out, silu=True, offset=offset)
    decoder.conv_act = nn.Identity()


def _rewrite_block(block: Any, offset: torch.Tensor) -> torch.Tensor:
    """Replace what is in a block whose input lacks offset; what its output lacks."""
    attentions: Any = getattr(block, "attentions", None) or ()
    for index, (resnet, attention) in enumerate(zip_longest(block.resnets, attentions)):
        _check(resnet, ResnetBlock2D)
        block.resnets[index] = ResidualBlock(resnet, offset)
        offset = block.resnets[index].lacks
        if attention is not None:
            _check(attention, Attention)
            attentions[index] = ChunkedAttention(attention, offset)
    upsamplers: Any = getattr(block, "upsamplers", None) or ()
    for index, upsampler in enumerate(upsamplers):
        _check(upsampler, Upsample2D)
        upsamplers[index] = FoldedUpsampling(upsampler, offset)
        offset = upsamplers[index].lacks
    return offset


def _check(module: object, kind: type[nn.Module]) -> None:
    if type(module) is not kind:
        raise ValueError(f"a {type(module).__name__} stands where a {kind.__name__} is expected")
