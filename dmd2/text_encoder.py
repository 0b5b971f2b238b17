"""Prompts to embeddings: SDXL's two tokenizers and text encoders, as stock diffusers runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TextEmbeds:
    """What the UNet reads of one prompt.

    Attributes:
        prompt_embeds: [1, 77, 2048] for SDXL: both encoders' penultimate hidden states.
        pooled_prompt_embeds: [1, 1280] for SDXL: the projection of encoder 2.
        truncated: the words past the 77th token, which no encoder read; "" where none.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    truncated: str = ""


class TextEncoder:
    """The two CLIP encoders of a model folder.

    Args:
        tokenizers: tokenizer and tokenizer_2.
        encoders: text_encoder and text_encoder_2 (the one with the projection).
        zeros_for_empty: model_index.json's force_zeros_for_empty_prompt: no negative prompt
            is encoded as zeros, and not as the empty text.
    """

    def __init__(
        self, tokenizers: tuple[Any, Any], encoders: tuple[Any, Any], zeros_for_empty: bool
    ) -> None:
        self._tokenizers = tokenizers
        self._encoders = encoders
        self._zeros_for_empty = zeros_for_empty

    def encode(self, prompt: str) -> TextEmbeds:
        """Embed a prompt; past 77 tokens it is cut, and truncated says which words."""
        hidden_states, pooled, truncated = [], torch.empty(0), ""
        for tokenizer, encoder in zip(self._tokenizers, self._encoders, strict=True):
            token_ids, cut = _tokenize(tokenizer, prompt)
            output = encoder(token_ids.to(encoder.device), output_hidden_states=True)
            hidden_states.append(output.hidden_states[-2])
            pooled = output[0]
            truncated = max(truncated, cut, key=len)
        return TextEmbeds(torch.cat(hidden_states, dim=-1), pooled, truncated)

    def encode_negative(self, negative_prompt: str) -> TextEmbeds:
        """Embed the negative prompt of guidance; "" is none, as stock diffusers takes None."""
        embeds = self.encode(negative_prompt)
        if negative_prompt or not self._zeros_for_empty:
            return embeds
        return TextEmbeds(
            torch.zeros_like(embeds.prompt_embeds), torch.zeros_like(embeds.pooled_prompt_embeds)
        )


def _tokenize(tokenizer: Any, prompt: str) -> tuple[torch.Tensor, str]:
    """Token ids [1, 77], and the words that did not fit."""
    max_length = tokenizer.model_max_length
    token_ids = tokenizer(
        prompt, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
    ).input_ids
    whole = tokenizer(prompt, truncation=False, verbose=False).input_ids
    # The last place within max_length is the end token's; whole ends with one too.
    cut = whole[max_length - 1 : -1]
    return token_ids, tokenizer.decode(cut, clean_up_tokenization_spaces=False)
