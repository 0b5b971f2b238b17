"""Ways, models and a clock that a test writes the script of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dmd2.fast.runner import Runner
from dmd2.fast.tuning import Bench
from dmd2.fast.ways import Facts, Part, Way

PLAIN_OUTPUT = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
FACTS = Facts(torch.device("cpu"), torch.float32)


class Clock:
    """Seconds that pass when a fake says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class FakeModel:
    """Returns what it is told to, and takes its time.

    Attributes:
        seconds: of each call; the last one goes on.
        output: of a call, by its number from 0; it may raise.
    """

    clock: Clock
    seconds: list[float]
    output: Callable[[int], torch.Tensor] = field(default=lambda number: PLAIN_OUTPUT.clone())
    num_calls: int = 0

    def __call__(self) -> torch.Tensor:
        number = self.num_calls
        self.num_calls += 1
        self.clock.seconds += self.seconds[min(number, len(self.seconds) - 1)]
        return self.output(number)


def call(model: Any) -> torch.Tensor:
    """What a bench asks of a model."""
    output: torch.Tensor = model()
    return output


def bench_for(clock: Clock, plain_s: float, part: Part = "step", num_calls: int = 2) -> Bench:
    """A bench whose plain model takes so long, and is known to."""
    runner = Runner(part, FakeModel(clock, [plain_s]))
    return Bench(runner, FACTS, [call] * num_calls, plain_s)


def way_of(model: FakeModel, name: str = "fake", part: Part = "step", **more: Any) -> Way:
    """A way that builds a model."""
    return Way(name, part, lambda plain: model, **more)


def raising(error: Exception, at: int = 0) -> Callable[[int], torch.Tensor]:
    """An output that raises from a call on."""

    def output(number: int) -> torch.Tensor:
        if number >= at:
            raise error
        return PLAIN_OUTPUT.clone()

    return output
