"""Random LoRA files in the formats that trainers write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from dmd2.loras.delta import merge
from dmd2.loras.formats import Lora
from dmd2.loras.names import MODEL_PARTS

Tensors = dict[str, torch.Tensor]
Weights = Mapping[str, Mapping[str, torch.Tensor]]


def low_rank(
    shapes: Mapping[str, Iterable[int]], rank: int, alpha: float | None, seed: int = 0
) -> Tensors:
    """Kohya's three tensors a module, of modules by the file's names; two where alpha is None."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for module, (num_out, *rest) in shapes.items():
        ones = [1] * (len(rest) - 1)
        lora[f"{module}.lora_down.weight"] = torch.randn(rank, *rest, generator=generator) / 8
        lora[f"{module}.lora_up.weight"] = (
            torch.randn(num_out, rank, *ones, generator=generator) / 8
        )
        if alpha is not None:
            lora[f"{module}.alpha"] = torch.tensor(alpha)
    return lora


def merged(weights: Weights, *loras: tuple[Lora, float]) -> dict[str, Tensors]:
    """All weights of all parts with LoRAs."""
    return {
        part: {
            **weights[part],
            **merge(weights[part], [(lora.deltas.get(part, {}), scale) for lora, scale in loras]),
        }
        for part in MODEL_PARTS
    }


def assert_same(found: Weights, expected: Weights, base: Weights) -> None:
    """The same weights, and in each part that is expected to change some that did."""
    for part in MODEL_PARTS:
        assert found[part].keys() == expected[part].keys()
        different = [n for n, t in expected[part].items() if not _is_near(found[part][n], t, 1e-6)]
        assert not different, part
    moved = [[p for p in MODEL_PARTS if _has_moved(w[p], base[p])] for w in (found, expected)]
    assert moved[0] == moved[1] != []


def _has_moved(weights: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> bool:
    return not all(_is_near(weights[name], tensor, 1e-2) for name, tensor in base.items())


def _is_near(left: torch.Tensor, right: torch.Tensor, tolerance: float) -> bool:
    return left is right or torch.allclose(left, right, rtol=1e-5, atol=tolerance)
