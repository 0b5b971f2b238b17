"""What a LoRA adds to a weight, in every format's formula, and weights with LoRAs added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch

from dmd2.errors import MergeError

Parts = Mapping[str, torch.Tensor]
# A weight's change may be one row of zeros, whose norm is 0.
_EPS = torch.finfo(torch.float32).eps


def _lora(p: Parts) -> torch.Tensor:
    """Up @ down (arXiv 2106.09685, section 4.1); a convolution's down has the kernel."""
    up, down = p["up"], p["down"]
    return (up.reshape(up.shape[:2]) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def _tucker(p: Parts) -> torch.Tensor:
    """A convolution's kernel between two matrices (LyCORIS, arXiv 2309.14859)."""
    up, down = (p[part].reshape(p[part].shape[:2]) for part in ("up", "down"))
    return torch.einsum("mn...,im,nj->ij...", p["mid"], up, down)


def _loha(p: Parts) -> torch.Tensor:
    """Two products, multiplied element by element (arXiv 2108.06098, proposition 1)."""
    return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])


def _loha_tucker(p: Parts) -> torch.Tensor:
    """The same with a kernel in each (proposition 3)."""
    left, right = (
        torch.einsum("ij...,ip,jr->pr...", p[f"hada_t{n}"], p[f"hada_w{n}_a"], p[f"hada_w{n}_b"])
        for n in (1, 2)
    )
    return left * right


def _lokr(p: Parts) -> torch.Tensor:
    """A Kronecker product of two factors, each whole or a product (LyCORIS)."""
    left = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_w2" in p:
        right = p["lokr_w2"]
    elif "lokr_t2" in p:
        right = torch.einsum("ij...,ip,jr->pr...", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        b = p["lokr_w2_b"]
        right = (p["lokr_w2_a"] @ b.flatten(1)).reshape(-1, *b.shape[1:])
    left = left.reshape([*left.shape, *[1] * (right.ndim - left.ndim)])
    return torch.kron(left, right.contiguous())


def _whole(p: Parts) -> torch.Tensor:
    """The difference itself."""
    return p["diff"]


_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_KRON_LEFT = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_KRON_RIGHT = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
# What a module may consist of, and the product of that.
PRODUCTS: Mapping[frozenset[str], Callable[[Parts], torch.Tensor]] = {
    frozenset({"down", "up"}): _lora,
    frozenset({"down", "mid", "up"}): _tucker,
    frozenset(_HADA): _loha,
    frozenset(_HADA | {"hada_t1", "hada_t2"}): _loha_tucker,
    **{frozenset(left | right): _lokr for left in _KRON_LEFT for right in _KRON_RIGHT},
    frozenset({"diff"}): _whole,
}
_KERNELS = ("mid", "hada_t1", "hada_t2", "lokr_t2")
_RANK_OF = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


def rank_of(parts: Parts) -> int | None:
    """A module's rank, which its alpha is divided by; None where nothing is decomposed."""
    return next((parts[name].shape[:1].numel() for name in _RANK_OF if name in parts), None)


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """What one module of a LoRA file adds to one parameter.

    Attributes:
        parts: the tensors of one of PRODUCTS, as the file has them.
        factor: the product is multiplied by it: alpha / rank.
        magnitude: DoRA's m, in the weight's number of dimensions, of size 1 in all but one.
    """

    parts: Parts
    factor: float = 1.0
    magnitude: torch.Tensor | None = None

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """The difference at scale 1, to be multiplied by the scale: float32, of weight's shape.

        Without DoRA that is the product. With DoRA (arXiv 2402.09353, equation 5, of which the
        norm is taken over all but m's dimension) it is m * (W + product) / |W + product| - W, so
        that at scale 0 a model is what it was; peft, which has the scale within the norm, agrees
        at scale 1 alone.

        Args:
            weight: the parameter in float32, without any LoRA, on the device to compute on.
        """
        change = self.factor * self._product(weight.device).reshape(weight.shape)
        if self.magnitude is None:
            return change
        changed = weight + change
        over = [dim for dim, size in enumerate(self.magnitude.shape) if size == 1]
        norm: torch.Tensor = torch.linalg.vector_norm(changed, dim=over, keepdim=True)
        return self.magnitude.to(weight.device, torch.float32) / (norm + _EPS) * changed - weight

    def fits(self, shape: torch.Size) -> bool:
        """Whether the tensors fit each other and a parameter's shape; computes nothing.

        A convolution's product may be a matrix, and a matrix's product a 1x1 convolution.
        """
        # Square, or hardly any bytes of a file could ask for terabytes on the way.
        kernels = [self.parts[name] for name in _KERNELS if name in self.parts]
        if any(kernel.ndim < 2 or len(kernel) != kernel.shape[1] for kernel in kernels):
            return False
        try:
            found = self._product(torch.device("meta")).shape
        except (RuntimeError, IndexError, ValueError):
            return False
        if found not in (shape, (shape[0], shape[1:].numel()), (*shape, 1, 1)):
            return False
        ones = [1] * (len(shape) - 2)
        per_axis = ((shape[0], 1, *ones), (1, *shape[1:2], *ones))
        return self.magnitude is None or self.magnitude.shape in per_axis

    def _product(self, device: torch.device) -> torch.Tensor:
        parts = {name: part.to(device).float() for name, part in self.parts.items()}
        return PRODUCTS[frozenset(parts)](parts)


Deltas = Mapping[str, WeightDelta]


def merge(
    weights: Mapping[str, torch.Tensor], loras: Sequence[tuple[Deltas, float]]
) -> dict[str, torch.Tensor]:
    """The weights that LoRAs touch, with the LoRAs: W + sum of scale * delta(W), rounded once.

    Args:
        weights: a model's parameters by name, any float dtype; they are not written to.
        loras: what each adds, by parameter, and its scale; in the order of the sum.

    Returns:
        New tensors for the touched parameters alone, in the dtypes and on the devices of weights.

    Raises:
        MergeError: a sum is more than its dtype can hold.
    """
    merged = {}
    for name in dict.fromkeys(name for deltas, _ in loras for name in deltas):
        weight = weights[name].float()
        total = weight
        for deltas, scale in loras:
            if name in deltas:
                total = total + scale * deltas[name].delta(weight)
        merged[name] = total.to(weights[name].dtype)
    if (large := _first_infinite(merged)) is not None:
        dtype = str(merged[large].dtype).removeprefix("torch.")
        raise MergeError(
            f"with it, {large} is more than {dtype} can hold",
            "Use a smaller scale, or another file: a good one changes weights by little",
            _largest(weights[large].float(), [(of.get(large), scale) for of, scale in loras]),
        )
    return merged


def _first_infinite(merged: Mapping[str, torch.Tensor]) -> str | None:
    """A parameter that is not finite; asked of the device once, not once a parameter."""
    if not merged:
        return None
    is_finite = torch.stack([tensor.isfinite().all() for tensor in merged.values()])
    return None if is_finite.all() else list(merged)[int(is_finite.int().argmin())]


def _largest(weight: torch.Tensor, deltas: Sequence[tuple[WeightDelta | None, float]]) -> int:
    """The place of what changes a weight most."""
    changes = [
        0.0 if delta is None else float((scale * delta.delta(weight)).abs().nan_to_num(inf).max())
        for delta, scale in deltas
    ]
    return changes.index(max(changes))
