"""The compiled way's models before they compile: what they share with plain, and what they do not.

What they return is tests/sampling/test_compile.py's affair.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dmd2.fast.compiled import compiled_decoder, compiled_unet
from dmd2.models.loading import ModelParts


def lies(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Where each tensor of a model lies, and how."""
    return {name: (t.data_ptr(), t.stride()) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_plain_stays_as_it_lies_and_shares_all_but_kernels(part: str, parts: ModelParts) -> None:
    plain: Any = getattr(parts, part)
    before, values = lies(plain), {k: t.clone() for k, t in plain.state_dict().items()}
    compiled = {"unet": compiled_unet, "vae": compiled_decoder}[part](plain)
    assert lies(plain) == before
    laid_out = 0
    for name, tensor in compiled.state_dict().items():
        assert torch.equal(tensor, values[name])
        if tensor.data_ptr() != before[name][0]:
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            laid_out += 1
    inside = plain if part == "unet" else plain.decoder
    assert laid_out == sum(isinstance(module, nn.Conv2d) for module in inside.modules())
    assert (compiled.dtype, compiled.config) == (plain.dtype, plain.config)
