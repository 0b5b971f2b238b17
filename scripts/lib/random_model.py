"""A model folder in SDXL's own classes with random weights: for tests, benchmarks and try-outs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from training.model_folder import write_model_folder

# Every kind of block that SDXL has, as small as they come.
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "addition_time_embed_dim": 8,
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "norm_num_groups": 8,
}
TINY_VAE = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}

SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "addition_time_embed_dim": 256,
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}


def write_random_model(
    folder: Path,
    *,
    size: str = "tiny",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Path:
    """Write a complete model folder whose weights follow from seed, and from device.

    Args:
        folder: is made; must not exist.
        size: "tiny" (64x64 pixels, a few MB) or "sdxl" (full size, 7 GB in float16).
        seed: of torch's generator.
        dtype: of the stored weights.
        device: draws them.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.device(device):
            models = {name: model.to("cpu", dtype) for name, model in _models(size).items()}
    return write_model_folder(folder, models, dtype=dtype)


def random_unet(size: str) -> Any:
    """SDXL's UNet, "tiny" or "sdxl", with whatever weights torch's generator gives."""
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        use_linear_projection=True,
        **(TINY_UNET if size == "tiny" else SDXL_UNET),
    )


def _models(size: str) -> dict[str, Any]:
    vae = TINY_VAE if size == "tiny" else SDXL_VAE
    return {
        "text_encoder": CLIPTextModel(_text_config(size, 1)),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(size, 2)),
        "unet": random_unet(size),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            scaling_factor=0.13025,
            force_upcast=False,
            **vae,
        ),
    }


def _text_config(size: str, encoder: int) -> CLIPTextConfig:
    """Encoder 1 is CLIP ViT-L's, encoder 2 OpenCLIP bigG's; tiny ones keep their activations."""
    common = {
        "vocab_size": 49408,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "hidden_act": "quick_gelu" if encoder == 1 else "gelu",
    }
    if size == "tiny":
        return CLIPTextConfig(num_attention_heads=2, projection_dim=32, **TINY_TEXT, **common)
    if encoder == 1:
        return CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
            **common,
        )
    return CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        **common,
    )
