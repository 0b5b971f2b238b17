"""The lean UNet: plain's output on plain's weights, whatever the config."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparing import Launched, error, fingerprint, unet_inputs
from diffusers import UNet2DConditionModel
from random_model import TINY_UNET
from torch import nn

from dmd2.fast import group_norm
from dmd2.fast.group_norm import SplitGroupNorm
from dmd2.fast.unet import lean_unet
from dmd2.models.loading import ModelParts

pytestmark = pytest.mark.usefixtures("for_inference")
# What SDXL has no use for and the loader takes.
OTHER_CONFIGS: dict[str, dict[str, Any]] = {
    "time scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "output scaled": {"mid_block_scale_factor": 1.5, "resnet_out_scale_factor": 2.0},
    "resnets that sample": {
        "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "simple cross attention": {
        "down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "cross_attention_norm": "group_norm",
    },
    "convolution projections, another activation": {
        "use_linear_projection": False,
        "act_fn": "mish",
    },
}


def call(unet: Any, inputs: tuple[Any, dict[str, Any]]) -> torch.Tensor:
    args, kwargs = inputs
    return unet(*args, **kwargs)[0]


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 9, 13), (2, 16, 4)], ids=str)
def test_it_equals_plain_in_float32(parts: ModelParts, size: tuple[int, int, int]) -> None:
    inputs = unet_inputs(parts.unet, *size)
    result = lean_unet(parts.unet)(*inputs[0], **inputs[1])
    assert isinstance(result, tuple)
    assert error(result[0], call(parts.unet, inputs)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_half_precision_it_is_as_near_to_float32_as_plain(
    trained: ModelParts, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_norm, "LEFT_TO_ATEN", {})
    plain = copy.deepcopy(trained.unet).to(dtype)
    inputs = unet_inputs(plain, 1, 9, 12)
    args, kwargs = inputs
    raised = {k: v.float() for k, v in kwargs["added_cond_kwargs"].items()}
    hidden = kwargs["encoder_hidden_states"].float()
    # The reference has the same rounded weights and inputs.
    reference = copy.deepcopy(plain).float()(
        args[0].float(), args[1], hidden, added_cond_kwargs=raised, return_dict=False
    )[0]
    lean, own = (error(call(unet, inputs), reference) for unet in (lean_unet(plain), plain))
    assert lean <= 1.5 * own


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize("config", OTHER_CONFIGS)
def test_it_equals_plain_in_other_configs(config: str) -> None:
    torch.manual_seed(0)
    own = {"encoder_hid_dim": 64} if "simple" in config else {}
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "use_linear_projection": True,
    }
    unet = UNet2DConditionModel(**{**TINY_UNET, **blocks, **own, **OTHER_CONFIGS[config]}).eval()
    unet.requires_grad_(False)
    inputs = unet_inputs(unet, 2, 8, 12)
    assert error(call(lean_unet(unet), inputs), call(unet, inputs)) <= 1e-5


def test_plain_stays_as_it_was(parts: ModelParts) -> None:
    inputs = unet_inputs(parts.unet, 2, 8, 8)
    before, output = fingerprint(parts.unet), call(parts.unet, inputs)
    call(lean_unet(parts.unet), inputs)
    assert fingerprint(parts.unet) == before
    assert call(parts.unet, inputs).equal(output)


def test_every_weight_is_shared_and_a_change_in_place_is_seen(parts: ModelParts) -> None:
    unet = copy.deepcopy(parts.unet)
    lean, inputs = lean_unet(unet), unet_inputs(unet, 1, 8, 8)
    own = dict(unet.named_parameters())
    assert all(parameter is own[name] for name, parameter in lean.named_parameters())
    assert len(own) == len(list(lean.parameters()))
    before = call(lean, inputs)
    for name, weight in own.items():
        if name.endswith(("norm1.weight", "conv1.weight", "to_q.weight")):
            weight.mul_(1.25)
    assert error(call(lean, inputs), before) > 1e-3
    assert error(call(lean, inputs), call(unet, inputs)) <= 1e-5


def test_no_division_and_no_plain_group_norm_is_left(trained: ModelParts) -> None:
    lean = lean_unet(trained.unet)
    factors = ("output_scale_factor", "rescale_output_factor")
    blocks = sum(hasattr(m, factor) for m in lean.modules() for factor in factors)
    divisions = []
    for unet in (trained.unet, lean):
        with Launched() as launched:
            call(unet, unet_inputs(unet, 1, 8, 8))
        divisions.append(launched.names.count("aten.div.Tensor"))
    assert divisions[0] - divisions[1] == blocks > 0
    assert {type(m) for m in lean.modules() if isinstance(m, nn.GroupNorm)} == {SplitGroupNorm}
