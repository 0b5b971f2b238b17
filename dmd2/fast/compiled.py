"""DMD2_COMPILE: the UNet and the VAE's decoder, compiled (torch.compile) with channels last."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dmd2.fast.twin import twin


def compiled_unet(unet: Any) -> Any:
    """A UNet to be called as this one is, which compiles itself as it is called.

    One image's shape is compiled for itself, and the second number of images for any number. unet
    stays as it was; of its convolutions' weights there is a second copy, channels last.
    """
    compiled = twin(unet)
    _put_channels_last(compiled)
    compiled.compile(fullgraph=True)
    return compiled


def compiled_decoder(vae: Any) -> Any:
    """An AutoencoderKL to decode as this one does, whose decoder compiles itself likewise."""
    compiled = twin(vae)
    compiled.encoder = compiled.quant_conv = None
    _put_channels_last(compiled.decoder)
    compiled.decoder.compile(fullgraph=True)
    return compiled


def compile_no_more() -> None:
    """From now on, in this process, shapes that were not compiled run as they are written."""
    torch.compiler.set_stance("eager_on_recompile")


def _put_channels_last(model: nn.Module) -> None:
    """Give the convolutions weights of their own: those that they share stay as they lie."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            laid_out = module.weight.detach().clone(memory_format=torch.channels_last)
            module.weight = nn.Parameter(laid_out, requires_grad=False)
