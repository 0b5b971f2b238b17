"""How far a faster way is from the plain one, and whether plain is still plain."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Launched(TorchDispatchMode):
    """Notes the names of all that torch is asked to compute, as "aten.div.Tensor"."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """The norm of the difference over the norm of the reference, in float64."""
    difference = result.double() - reference.double()
    return (difference.norm() / reference.double().norm()).item()


def fingerprint(model: Any) -> dict[str, object]:
    """All that may not change: classes, plain attributes, and weights as they lie."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        values = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple)}
        found[f"{name}:"] = (type(module), values)
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = (id(tensor), tensor.data_ptr(), tensor.stride(), tensor.dtype)
        found[name] = (place, tensor.detach().double().sum().item())
    return found


def unet_inputs(unet: Any, batch: int, height: int, width: int) -> tuple[Any, dict[str, Any]]:
    """Arguments of a UNet call, each image at a timestep of its own."""
    generator = torch.Generator().manual_seed(batch * 1000 + height)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(unet.dtype)

    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    size = torch.tensor([height, width, 0, 0, height, width]) * 8.0
    kwargs = {
        "encoder_hidden_states": normal(batch, 77, config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": normal(batch, pooled),
            "time_ids": size.to(unet.dtype).expand(batch, 6),
        },
        "return_dict": False,
    }
    timesteps = torch.tensor([999, 749, 499, 249]).repeat(batch)[:batch]
    return (normal(batch, config.in_channels, height, width), timesteps), kwargs
