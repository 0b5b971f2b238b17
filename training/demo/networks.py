"""The demo's text encoders and UNet: SDXL's classes, small, with a vocabulary that grows later.

CLIP's vocabulary has 49,408 entries, and the demo's language has some two hundred. Training keeps a
compact embedding, one row for each token of the language and one for all the others together;
`spread_embedding` gives every token of the vocabulary its row when the model is written. So a
word that the demo does not know reads as one that it was taught to pass over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dmd2.sampling import sampler
from training.config import DemoConfig
from training.demo.language import WORDS
from training.demo.scenes import IMAGE_SIZE
from training.method.conditioning import embed

VOCABULARY_SIZE = 49408
_OTHER = 1  # the compact row of every token that the language does not have


def new_unet(config: DemoConfig) -> UNet2DConditionModel:
    """SDXL's UNet with all its kinds of blocks, in the demo's widths."""
    width = config.text_widths[0] + config.text_widths[1]
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=config.unet_channels,
        layers_per_block=config.unet_layers_per_block,
        transformer_layers_per_block=config.unet_transformer_layers,
        attention_head_dim=config.unet_heads,
        cross_attention_dim=width,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + config.text_widths[1],
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        use_linear_projection=True,
    )


class CompactVocabulary:
    """The tokens of the demo's language, numbered from 0.

    Row 0 is the token "!", with which SDXL pads for its second encoder; row 1 stands for every
    token outside the language; the end token has the highest number, by which SDXL's encoders
    find it.

    Args:
        tokenizer: SDXL's.
    """

    def __init__(self, tokenizer: Any) -> None:
        ids = tokenizer(list(WORDS), add_special_tokens=False).input_ids
        known = sorted({token for word in ids for token in word})
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        self._tokens = torch.tensor([0, *(token for token in known if token), *special])
        self._rows = torch.full((VOCABULARY_SIZE,), _OTHER)
        self._rows[0] = 0
        self._rows[self._tokens[1:]] = torch.arange(2, self.size)

    @property
    def size(self) -> int:
        """How many rows a compact embedding has."""
        return len(self._tokens) + 1

    def compact(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids of the vocabulary as rows of the compact embedding."""
        return self._rows[token_ids]

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """A compact embedding [size, D] as one of the whole vocabulary [49408, D]."""
        return rows[self._rows.to(rows.device)]


def new_text_encoders(config: DemoConfig, vocabulary_size: int) -> tuple[Any, Any]:
    """SDXL's two kinds of text encoder, each with the activation that SDXL's has."""
    encoders = []
    for number, (width, num_layers) in enumerate(
        zip(config.text_widths, config.text_layers, strict=True)
    ):
        text = CLIPTextConfig(
            vocab_size=vocabulary_size,
            bos_token_id=0,
            eos_token_id=2,  # as SDXL's files say: the end token is the one of the highest id
            pad_token_id=1,
            hidden_act="quick_gelu" if number == 0 else "gelu",
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            projection_dim=width,
        )
        encoder = CLIPTextModel(text) if number == 0 else CLIPTextModelWithProjection(text)
        # CLIP's own start is for 400 million captions: tables this small learn faster from
        # embeddings as large as what the layers add to them; and positions much smaller than
        # tokens would not be read.
        nn.init.normal_(encoder.get_input_embeddings().weight, std=0.5)
        text_model = encoder if number == 0 else encoder.text_model
        nn.init.normal_(text_model.embeddings.position_embedding.weight, std=0.25)
        encoders.append(encoder)
    # SDXL reads the first encoder before its last layer, which therefore never learns.
    encoders[0].encoder.layers[-1].requires_grad_(False)
    encoders[0].final_layer_norm.requires_grad_(False)
    return encoders[0], encoders[1]


def spread_embedding(encoder: Any, vocabulary: CompactVocabulary) -> None:
    """Give an encoder trained on the compact vocabulary the whole one, in place."""
    rows = vocabulary.spread(encoder.get_input_embeddings().weight.detach())
    table = nn.Embedding(*rows.shape)
    table.weight = nn.Parameter(rows)
    encoder.set_input_embeddings(table)
    encoder.config.vocab_size = VOCABULARY_SIZE


class Denoiser(nn.Module):
    """A UNet and the text encoders that are trained with it."""

    def __init__(self, unet: nn.Module, encoders: tuple[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder, self.text_encoder_2 = encoders

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        token_ids: Sequence[torch.Tensor],
        keep: torch.Tensor,
    ) -> torch.Tensor:
        """The noise prediction [B, 4, H/8, W/8].

        Args:
            latents: [B, 4, H/8, W/8], noised.
            timesteps: int64 [B].
            token_ids: for each encoder int64 [B, 77].
            keep: bool [B]; where false, the caption is dropped: all its embeddings are zeros,
                as SDXL's training and the container's missing negative prompt have it.
        """
        encoders = (self.text_encoder, self.text_encoder_2)
        prompt_embeds, pooled = embed(encoders, token_ids)
        height, width = (8 * side for side in latents.shape[2:])
        time_ids = sampler.add_time_ids(height, width).to(latents.device)
        noise_pred: torch.Tensor = self.unet(
            latents,
            timesteps,
            encoder_hidden_states=prompt_embeds * keep[:, None, None],
            added_cond_kwargs={
                "text_embeds": pooled * keep[:, None],
                "time_ids": time_ids.expand(len(latents), -1),
            },
        ).sample
        return noise_pred
