"""The lean decoder: plain's pixels, tiles and half precision included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparing import Launched, error, fingerprint
from diffusers import AutoencoderKL, AutoencoderTiny
from random_model import TINY_VAE
from torch import nn
from torch.nn import functional

from dmd2.fast import attention
from dmd2.fast.attention import attend
from dmd2.fast.decoder import lean_decoder
from dmd2.fast.group_norm import SplitGroupNorm
from dmd2.fast.residual import fold_upsampling
from dmd2.models import vae
from dmd2.models.loading import ModelParts

pytestmark = pytest.mark.usefixtures("for_inference")


def latents(model: Any, batch: int, height: int, width: int) -> torch.Tensor:
    """float32, as large as real ones."""
    generator = torch.Generator().manual_seed(height)
    return torch.randn(batch, model.config.latent_channels, height, width, generator=generator)


def images(model: Any, x0: torch.Tensor) -> torch.Tensor:
    scaled = x0 / model.config.scaling_factor
    return model.decode(scaled.to(model.dtype), return_dict=False)[0]


def assert_same(plain: Any, lean: Any, x0: torch.Tensor) -> None:
    assert error(images(lean, x0), images(plain, x0)) <= 1e-5
    (pixels, finite), (expected, _) = (vae.decode(model, x0) for model in (lean, plain))
    assert (pixels.int() - expected.int()).abs().max() <= 1
    assert finite.all()


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 9, 13), (1, 1, 5)], ids=str)
def test_it_equals_plain_in_float32(parts: ModelParts, size: tuple[int, int, int]) -> None:
    assert_same(parts.vae, lean_decoder(parts.vae), latents(parts.vae, *size))


def test_it_decodes_in_plain_s_tiles(parts: ModelParts) -> None:
    plain = copy.deepcopy(parts.vae)
    plain.enable_tiling()
    plain.tile_sample_min_size, plain.tile_latent_min_size = 64, 8
    lean, x0 = lean_decoder(plain), latents(plain, 1, 9, 13)
    assert_same(plain, lean, x0)
    assert error(images(plain, x0), images(parts.vae, x0)) > 1e-3, "these are no tiles"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_half_precision_it_is_as_near_to_float32_as_plain(
    trained: ModelParts, dtype: torch.dtype
) -> None:
    plain = copy.deepcopy(trained.vae).to(dtype)
    x0 = latents(plain, 1, 9, 12).to(dtype).float()
    rounded = (x0 / plain.config.scaling_factor).to(dtype).float()
    reference = copy.deepcopy(plain).float().decode(rounded, return_dict=False)[0]
    lean, own = (error(images(m, x0), reference) for m in (lean_decoder(plain), plain))
    assert lean <= 1.5 * own


def test_it_stands_in_for_the_vae(parts: ModelParts) -> None:
    lean = lean_decoder(parts.vae)
    assert lean.config == parts.vae.config
    assert lean.dtype == parts.vae.dtype
    assert vae.most_at_once(lean, 8, 8) == vae.most_at_once(parts.vae, 8, 8)
    x0 = latents(parts.vae, 1, 8, 8)
    again, expected = (vae.decode_in_float32(model, x0) for model in (lean, parts.vae))
    assert (again.int() - expected.int()).abs().max() <= 1


def test_plain_stays_as_it_was(parts: ModelParts) -> None:
    x0 = latents(parts.vae, 2, 8, 8)
    before, output = fingerprint(parts.vae), images(parts.vae, x0)
    images(lean_decoder(parts.vae), x0)
    assert fingerprint(parts.vae) == before
    assert images(parts.vae, x0).equal(output)


def test_only_larger_kernels_are_copied(parts: ModelParts) -> None:
    own = {parameter.data_ptr() for parameter in parts.vae.parameters()}
    lean = lean_decoder(parts.vae)
    copied = {n for n, p in lean.named_parameters() if p.data_ptr() not in own}
    kernels = {
        f"{name}.weight"
        for name, module in lean.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.kernel_size != (1, 1)
    }
    assert copied == kernels
    assert all(
        p.is_contiguous(memory_format=torch.channels_last) for p in map(lean.get_parameter, kernels)
    )


def test_all_but_the_latents_have_their_channels_last(parts: ModelParts) -> None:
    lean, wrong = lean_decoder(parts.vae), []

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            if not output.is_contiguous(memory_format=torch.channels_last):
                wrong.append(name)

        return hook

    seen = 0
    for name, module in lean.decoder.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.GroupNorm):
            module.register_forward_hook(look(name))
            seen += 1
    images(lean, latents(parts.vae, 2, 9, 13))
    assert seen > 30
    assert wrong == []


def test_what_is_folded_and_fused_is_gone(parts: ModelParts) -> None:
    lean = lean_decoder(parts.vae)
    with Launched() as launched:
        images(lean, latents(parts.vae, 1, 8, 8))
    gone = ("upsample", "scaled_dot_product", "native_group_norm")
    assert not [name for name in launched.names if any(word in name for word in gone)]
    norms = [m for m in lean.modules() if isinstance(m, nn.GroupNorm)]
    assert all(type(norm) is SplitGroupNorm for norm in norms)
    assert sum(not norm.silu for norm in norms) == 1, "the attention's"


@pytest.mark.parametrize(
    "change",
    [
        {"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")},
        {"mid_block_add_attention": False},
        {"use_post_quant_conv": False},
        {"layers_per_block": 2, "latent_channels": 8},
    ],
    ids=str,
)
def test_it_equals_plain_in_other_configs(change: dict[str, Any]) -> None:
    torch.manual_seed(0)
    blocks = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "scaling_factor": 0.13025,
    }
    plain = AutoencoderKL(**{**TINY_VAE, **blocks, **change}).eval().requires_grad_(False)
    assert_same(plain, lean_decoder(plain), latents(plain, 2, 5, 6))


def test_another_autoencoder_is_refused() -> None:
    with pytest.raises(ValueError, match="AutoencoderTiny"):
        lean_decoder(AutoencoderTiny())


@pytest.mark.parametrize(
    ("part", "attribute", "value", "said"),
    [
        ("mid_block.attentions.0", "heads", 2, "one head"),
        ("mid_block.attentions.0", "rescale_output_factor", 2.0, "one head"),
        ("mid_block.resnets.0", "output_scale_factor", 2.0, "residual block"),
        ("mid_block.resnets.0", "nonlinearity", nn.Mish(), "Mish"),
        ("up_blocks.0.upsamplers.0.conv", "padding", (0, 0), "upsampling"),
        ("up_blocks.0", "resnets", nn.ModuleList([nn.Identity()]), "Identity"),
    ],
)
def test_what_is_unknown_is_refused(
    parts: ModelParts, part: str, attribute: str, value: object, said: str
) -> None:
    plain = copy.deepcopy(parts.vae)
    setattr(plain.decoder.get_submodule(part), attribute, value)
    before = fingerprint(plain)
    with pytest.raises(ValueError, match=said):
        lean_decoder(plain)
    assert fingerprint(plain) == before


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (9, 13)], ids=str)
def test_the_fold_is_exact_with_its_borders(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    upsampled = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = functional.conv2d(upsampled, weight, padding=1)
    folded = functional.conv_transpose2d(x, fold_upsampling(weight), stride=2, padding=1)
    assert error(folded, expected) < 1e-14


def test_the_fold_is_summed_before_it_is_rounded() -> None:
    weight = torch.tensor([1.0, 2.0**-11, 2.0**-11]).half()[:, None] * torch.eye(3)[1].half()
    folded = fold_upsampling(weight[None, None])
    assert folded[0, 0, 1, 1] == 2.0**-10
    assert folded.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 40.0])
def test_attention_in_chunks_is_as_near_to_float64_as_torch_s(
    dtype: torch.dtype, sharpness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_MAX_LOGITS", 3 * 2 * 300)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 300, 32, generator=generator) for _ in range(3))
    q, k, v = (q * sharpness).to(dtype), k.to(dtype), (v * 100).to(dtype)
    weights = (q.double() @ k.double().mT).softmax(-1)
    reference = weights @ v.double()
    own = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)
    assert error(attend(q, k, v), reference) <= 1.5 * error(own[:, 0], reference) + 1e-6


def test_large_logits_in_float16_are_finite() -> None:
    q = torch.full((1, 4, 512), 16.0).half()
    q[:, 2] = 20.0
    v = torch.arange(4.0).half()[None, :, None].expand(1, 4, 512)
    result = attend(q, q, v)  # 512 * 16 * 20 is past float16's 65,504
    assert result.equal(torch.full_like(result, 2.0))


def test_many_tokens_of_little_weight_count_in_float16() -> None:
    """16,383 tokens of weight 3e-8, which float16 has not, beside one of weight 1."""
    k, v = torch.zeros(1, 2**14, 1).half(), torch.ones(1, 2**14, 1).half()
    k[0, 0], v[0, 0] = 17.3, 0.0
    q = torch.ones(1, 1, 1).half()
    reference = (q.double() @ k.double().mT).softmax(-1) @ v.double()
    assert error(attend(q, k, v), reference) < 0.01


def test_no_more_logits_than_allowed_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MAX_LOGITS", 1000)
    sizes = []
    product = attention._product
    monkeypatch.setattr(
        attention,
        "_product",
        lambda a, b: sizes.append(a.shape[0] * a.shape[1] * b.shape[2]) or product(a, b),
    )
    attend(*(torch.randn(2, 100, 8) for _ in range(3)))
    assert max(sizes) <= 1000
    assert len(sizes) == 2 * 20
