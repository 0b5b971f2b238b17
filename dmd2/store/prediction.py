"""Whether a UNet predicts the noise of an image, as SDXL does, or something else in secret."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dmd2.model_card import read_json

if TYPE_CHECKING:
    import torch

# Of the correlation of what a UNet makes of pure noise with that noise: near 1 where it predicts
# noise. A v-prediction there is all but the image with its sign turned (arXiv 2202.00512:
# v = sqrt(a) eps - sqrt(1 - a) x0, and a is 0.005 at the last timestep).
_MIN_CORRELATION = 0.5
_LAST_TIMESTEP = 999
_MIN_SIDE = 8


def remark_on_prediction(weights: Mapping[str, torch.Tensor], folder: Path) -> str | None:
    """What to tell a user whose UNet does not seem to predict noise; None where it does.

    Args:
        weights: of the UNet, in any dtype.
        folder: has its config.json.
    """
    correlation = _correlation(weights, folder)
    if correlation >= _MIN_CORRELATION:
        return None
    return (
        f"what its UNet makes of pure noise is not that noise (correlation {correlation:.2f}, and "
        "near 1 where noise is predicted). If it is made for v-prediction without saying so, its "
        "images will be useless with DMD2"
    )


def _correlation(weights: Mapping[str, torch.Tensor], folder: Path) -> float:
    """Of a UNet's output with its input: one call, small and in bfloat16, without a prompt."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel.from_config(read_json(folder / "config.json"))
    dtype = torch.bfloat16
    unet.load_state_dict({key: t.to(dtype) for key, t in weights.items()}, assign=True)
    config = unet.config
    side = max(_MIN_SIDE, config.sample_size // 4)
    noise = torch.randn(
        (1, config.in_channels, side, side), generator=torch.Generator().manual_seed(0)
    )
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    size = 8.0 * side
    with torch.inference_mode():
        predicted = unet(
            noise.to(dtype),
            _LAST_TIMESTEP,
            encoder_hidden_states=torch.zeros((1, 77, config.cross_attention_dim), dtype=dtype),
            added_cond_kwargs={
                "text_embeds": torch.zeros((1, pooled), dtype=dtype),
                "time_ids": torch.tensor([[size, size, 0, 0, size, size]], dtype=dtype),
            },
        ).sample.float()
    both = torch.stack([noise.flatten(), predicted.flatten()])
    return torch.corrcoef(both)[0, 1].item()
