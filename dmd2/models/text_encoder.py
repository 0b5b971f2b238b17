"""Prompts to embeddings: SDXL's two tokenizers and text encoders, as stock diffusers runs them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.func import functional_call

from dmd2.models.device_work import to_device
from dmd2.models.weight_sets import WeightSets
from dmd2.request.lora_rules import LoraKey, LoraUse, key_of

# 0.3 MB each for SDXL in half precision.
_MAX_REMEMBERED = 64
# All that decides what a prompt's embeddings are: the LoRAs of the text encoders, and the prompt.
_Remembered = tuple[LoraKey, str]
_PARTS = ("text_encoder", "text_encoder_2")


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
    """The two CLIP encoders of a model folder, and the embeddings of the prompts used last.

    Args:
        tokenizers: tokenizer and tokenizer_2.
        encoders: text_encoder and text_encoder_2 (the one with the projection).
        zeros_for_empty: model_index.json's force_zeros_for_empty_prompt: no negative prompt
            is encoded as zeros, and not as the empty text.
        device: where the encoders run, wherever they lie.
        weight_sets: the encoders' weights with LoRAs added.
    """

    def __init__(
        self,
        tokenizers: tuple[Any, Any],
        encoders: tuple[Any, Any],
        zeros_for_empty: bool,
        device: torch.device,
        weight_sets: WeightSets,
    ) -> None:
        self._device = device
        self._weight_sets = weight_sets
        self._tokenizers = tokenizers
        self._encoders = encoders
        self._zeros_for_empty = zeros_for_empty
        self._remembered: OrderedDict[_Remembered, TextEmbeds] = OrderedDict()

    def encode(self, prompts: Sequence[str], loras: Sequence[LoraUse] = ()) -> list[TextEmbeds]:
        """Embed prompts, those that are new in one pass; past 77 tokens a prompt is cut.

        Args:
            prompts: of any number.
            loras: added to the encoders' weights, as far as they have parts for them.
        """
        of_text = [lora for lora in loras if any(lora.deltas.get(part) for part in _PARTS)]
        key = key_of(of_text)
        known = {p: self._remembered[key, p] for p in prompts if (key, p) in self._remembered}
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in known))
        if new:
            with ExitStack() as stack:
                for part in _PARTS:
                    stack.enter_context(self._weight_sets.using(part, of_text))
                known |= zip(new, self._embed(new), strict=True)
        for prompt in prompts:
            self._remembered[key, prompt] = known[prompt]
            self._remembered.move_to_end((key, prompt))
        while len(self._remembered) > _MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return [known[prompt] for prompt in prompts]

    def encode_negative(self, negative_prompt: str, loras: Sequence[LoraUse] = ()) -> TextEmbeds:
        """Embed the negative prompt of guidance; "" is none, as stock diffusers takes None."""
        (embeds,) = self.encode([negative_prompt], loras)
        if negative_prompt or not self._zeros_for_empty:
            return embeds
        return TextEmbeds(
            torch.zeros_like(embeds.prompt_embeds), torch.zeros_like(embeds.pooled_prompt_embeds)
        )

    def _embed(self, prompts: list[str]) -> list[TextEmbeds]:
        hidden_states, pooled, truncated = [], torch.empty(0), [""] * len(prompts)
        for tokenizer, encoder in zip(self._tokenizers, self._encoders, strict=True):
            tokens = [_tokenize(tokenizer, prompt) for prompt in prompts]
            token_ids = to_device(torch.cat([ids for ids, _ in tokens]), self._device)
            output = _run(encoder, token_ids)
            hidden_states.append(output.hidden_states[-2])
            pooled = output[0]
            cut = [words for _, words in tokens]
            truncated = [max(pair, key=len) for pair in zip(truncated, cut, strict=True)]
        whole = torch.cat(hidden_states, dim=-1)
        # Copies: a view would keep the whole batch in memory for as long as it is remembered.
        return [
            TextEmbeds(whole[i : i + 1].clone(), pooled[i : i + 1].clone(), truncated[i])
            for i in range(len(prompts))
        ]


def _run(encoder: Any, token_ids: torch.Tensor) -> Any:
    """An encoder's output on token_ids' device, to which copies of its weights go where they must.

    Called directly it is faster than with weights that are put in its place for a call.
    """
    if encoder.device == token_ids.device:
        return encoder(token_ids, output_hidden_states=True)
    tensors = chain(encoder.named_parameters(), encoder.named_buffers())
    weights = {name: tensor.to(token_ids.device) for name, tensor in tensors}
    return functional_call(encoder, weights, token_ids, {"output_hidden_states": True})


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
