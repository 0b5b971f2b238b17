"""The VAE's attention of every pixel to every pixel, in memory that has a bound."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from dmd2.fast.group_norm import SplitGroupNorm

# Logits that exist at once, in float32: 64 MiB.
_MAX_LOGITS = 2**24
# One of 16,384 even weights is 2^-14, below which float16 loses bits; times 2^10 none does.
_LIFT = 2.0**10


class ChunkedAttention(nn.Module):
    """An attention with one head and a residual sum.

    At 1024x1024 pixels it is 16,384 tokens of 512 channels, more than flash kernels take in a head.

    Args:
        attention: diffusers' Attention as a VAE has it; its linear layers are shared.
        offset: [C], what the input lacks by channel, and the output then lacks too.

    Raises:
        ValueError: it has several heads, or other norms, or no residual sum, or rescales.
    """

    def __init__(self, attention: Attention, offset: torch.Tensor) -> None:
        super().__init__()
        norms = (attention.spatial_norm, attention.norm_q, attention.norm_k)
        is_known = (
            attention.heads == 1
            and attention.residual_connection
            and attention.rescale_output_factor == 1
            and attention.group_norm is not None
            and attention.to_q.bias is not None
        )
        if not is_known or any(norm is not None for norm in norms):
            raise ValueError("an attention is not a VAE's: one head, a GroupNorm and a residual")
        self.group_norm = SplitGroupNorm(attention.group_norm, offset=offset)
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out[0]

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The residual sum [B, C, H, W]; temb is None, and there since diffusers passes it."""
        height = hidden_states.shape[2]
        tokens = self.group_norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)
        attended = attend(self._scaled_queries(tokens), self.to_k(tokens), self.to_v(tokens))
        mixed: torch.Tensor = self.to_out(attended).unflatten(1, (height, -1))
        return hidden_states + mixed.permute(0, 3, 1, 2)

    def _scaled_queries(self, tokens: torch.Tensor) -> torch.Tensor:
        """The queries over sqrt(C), scaled before they are rounded to half precision."""
        scale = tokens.shape[-1] ** -0.5
        flat, linear = tokens.flatten(0, 1), self.to_q
        scaled = torch.addmm(linear.bias, flat, linear.weight.T, beta=scale, alpha=scale)
        return scaled.view_as(tokens)


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(queries @ keys^T) @ values, some queries at a time, the softmax in float32.

    Args:
        queries: [B, N, C], already scaled.
        keys: [B, N, C] in the queries' dtype.
        values: the same.

    Returns:
        [B, N, C] in the queries' dtype.
    """
    num_rows = max(1, _MAX_LOGITS // (keys.shape[0] * keys.shape[1]))
    parts = []
    for some in torch.split(queries, num_rows, dim=1):
        # In half precision logits of 100 would be wrong by 5 %, and past 65,504 infinite.
        weights = _product(some, keys.transpose(1, 2)).softmax(-1)
        lifted = torch.mul(weights, _LIFT, out=torch.empty_like(weights, dtype=values.dtype))
        parts.append((_product(lifted, values) / _LIFT).to(values.dtype))
    return torch.cat(parts, dim=1)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The batched product in float32 at least, as tensor cores sum it."""
    if a.is_cuda and a.dtype.itemsize < torch.float32.itemsize:
        return torch.bmm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.bmm(a.to(dtype), b.to(dtype))
