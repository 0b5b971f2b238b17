"""Models that break at a call, or take their time by a clock of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Broken:
    """A UNet or a VAE that works until a call, and from then on does as broken says."""

    def __init__(self, model: Any, broken: Callable[[torch.Tensor], torch.Tensor], at: int) -> None:
        self._model, self._broken, self._at, self.num_calls = model, broken, at, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return self._through(self._model(*args, **kwargs)[0])

    def decode(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return self._through(self._model.decode(*args, **kwargs)[0])

    def _through(self, output: torch.Tensor) -> tuple[torch.Tensor]:
        self.num_calls += 1
        return (self._broken(output) if self.num_calls > self._at else output,)


class Ticking:
    """A UNet or a VAE that takes so long for each image of a call, by a clock of its own."""

    def __init__(self, model: Any, clock: list[float], seconds: float) -> None:
        self._model, self._clock, self._seconds = model, clock, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._clock[0] += self._seconds * len(latents)
        return self._model(latents, *args, **kwargs)

    def decode(self, latents: torch.Tensor, **kwargs: Any) -> Any:
        self._clock[0] += self._seconds * len(latents)
        return self._model.decode(latents, **kwargs)
