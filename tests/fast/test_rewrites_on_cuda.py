"""What only CUDA runs of the rewrites: its reductions, its products, and its layouts."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import error, unet_inputs
from torch import nn

from dmd2.fast.attention import attend
from dmd2.fast.decoder import lean_decoder
from dmd2.fast.group_norm import SplitGroupNorm
from dmd2.fast.unet import lean_unet
from dmd2.models.loading import load_parts
from dmd2.settings import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("for_inference")]

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


ANY = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def a_norm_and_input(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> tuple[nn.GroupNorm, torch.Tensor]:
    """The input has a mean of a thousand standard deviations, and another in each image."""
    norm = nn.GroupNorm(32, shape[1]).to("cuda", dtype)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(shape[1], device="cuda"))
    x = torch.randn(shape, device="cuda") + 1000
    x *= torch.arange(1, shape[0] + 1, device="cuda").view(-1, 1, 1, 1)
    return norm, x.to(dtype).contiguous(memory_format=layout)


@ANY
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 128, 512, 512), CONTIGUOUS),
        ((1, 128, 512, 512), CHANNELS_LAST),
        ((3, 96, 128, 200), CONTIGUOUS),
        ((3, 96, 128, 200), CHANNELS_LAST),
        ((2, 1280, 7, 9), CHANNELS_LAST),
    ],
    ids=str,
)
def test_a_split_group_norm_is_float64_s_rounded_once(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    norm, x = a_norm_and_input(shape, layout, dtype)
    result, reference = SplitGroupNorm(norm)(x), norm.double()(x.double().contiguous())
    rounding = error(reference.to(dtype), reference)
    assert error(result, reference) < 1.1 * rounding + 2e-4
    assert result.stride() == x.stride()


@ANY
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_an_offset_counts_as_if_it_were_added(
    layout: torch.memory_format, dtype: torch.dtype
) -> None:
    norm, x = a_norm_and_input((2, 96, 64, 72), layout, dtype)
    offset = torch.linspace(-30, 30, 96, device="cuda")
    whole = x.double() + offset.double().view(1, -1, 1, 1)
    result = SplitGroupNorm(norm, offset=offset)(x)
    reference = norm.double()(whole.contiguous())
    rounding = error(reference.to(dtype), reference)
    assert error(result, reference) < 1.1 * rounding + 2e-4
    assert result.stride() == x.stride()


@ANY
def test_short_contiguous_rows_are_aten_s(dtype: torch.dtype) -> None:
    """With such means that is off by 2 % in half precision, and so is plain."""
    norm, x = a_norm_and_input((2, 1280, 7, 9), CONTIGUOUS, dtype)
    assert SplitGroupNorm(norm)(x).equal(norm(x))


@HALF
def test_the_unet_is_as_near_to_float32_as_plain(dtype: torch.dtype) -> None:
    plain = load_parts(ROOT / "weights" / "demo", torch.device("cuda"), dtype).unet
    # Rows of 98,304 elements, which are split, and short ones, which are not.
    args, kwargs = unet_inputs(plain, 1, 128, 128)
    (latents, timesteps), added = args, kwargs["added_cond_kwargs"]
    hidden = kwargs["encoder_hidden_states"].cuda()
    added = {name: tensor.cuda() for name, tensor in added.items()}
    results = [
        unet(
            latents.to("cuda", kind),
            timesteps.cuda(),
            encoder_hidden_states=hidden.to(kind),
            added_cond_kwargs={name: tensor.to(kind) for name, tensor in added.items()},
            return_dict=False,
        )[0]
        for unet, kind in (
            (copy.deepcopy(plain).float(), torch.float32),
            (plain, dtype),
            (lean_unet(plain), dtype),
        )
    ]
    reference, own, lean = results
    assert error(lean, reference) <= 1.5 * error(own, reference)


@HALF
def test_the_decoder_is_as_near_to_float32_as_plain(dtype: torch.dtype) -> None:
    plain = load_parts(ROOT / "weights" / "demo", torch.device("cuda"), dtype).vae
    latents = torch.randn(2, 4, 33, 48, device="cuda").to(dtype) / plain.config.scaling_factor
    (reference,) = copy.deepcopy(plain).float().decode(latents.float(), return_dict=False)
    lean, wrong = lean_decoder(plain), []
    for name, module in lean.decoder.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.GroupNorm):
            module.register_forward_hook(
                lambda _, __, output, name=name: (
                    None
                    if output.is_contiguous(memory_format=torch.channels_last)
                    else wrong.append(name)
                )
            )
    own, new = (model.decode(latents, return_dict=False)[0] for model in (plain, lean))
    assert error(new, reference) <= 1.5 * error(own, reference)
    assert wrong == []


@HALF
def test_attention_keeps_float32_logits(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 5000, 512, device="cuda").to(dtype) for _ in range(3))
    reference = (q.double() @ k.double().mT).softmax(-1) @ v.double()
    assert error(attend(q, k, v), reference) < (1e-3 if dtype == torch.float16 else 8e-3)
