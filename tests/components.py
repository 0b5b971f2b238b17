"""Tiny stand-ins for the parts that a model may use beside its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from transformers import ViTConfig, ViTForImageClassification

from dmd2.store.manifest import write_record

PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "image_processor_type": "ViTImageProcessor",
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 48, "width": 40},
}


def write_checker(folder: Path, nsfw_bias: float = 0.0) -> Path:
    """A tiny random classifier in the classes of Falconsai/nsfw_image_detection."""
    config = ViTConfig(
        image_size=(48, 40),
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
        model.classifier.bias += torch.tensor([0.0, nsfw_bias])
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    write_record(folder, {"model": folder.name})
    return folder


def write_fast_decoder(folder: Path) -> Path:
    """A random TAESDXL, smaller than the real one."""
    channels = (16, 16, 16, 16)
    decoder = AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels
    )
    decoder.save_pretrained(folder)
    write_record(folder, {"model": folder.name})
    return folder
