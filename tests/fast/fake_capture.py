"""What a CPU can do in place of a capture of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dmd2.fast.graphs import Replay
from dmd2.fast.ways import WAYS

(GRAPH,) = (way for way in WAYS if way.name == "graph")


class FakeCapture:
    """Calls a function again where CUDA would replay it; all results lie in one pool.

    Attributes:
        captured: the batches, in turn.
        num_replays: of each graph, by the batch of its result.
        fails: what is raised by the capture, or the replay, of so many.
        spoils: what becomes of the results of so many.
    """

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.num_replays: dict[int, int] = {}
        self.fails: dict[tuple[str, int], Exception] = {}
        self.spoils: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
        self._pool: list[torch.Tensor] = []

    def __call__(self, run: Callable[[], torch.Tensor]) -> Replay:
        output = run().clone()
        batch = len(output)
        self._raise("capture", batch)
        self.captured.append(batch)
        self.num_replays[batch] = 0
        self._pool.append(output.fill_(torch.nan))  # a capture computes nothing

        def replay() -> torch.Tensor:
            self._raise("replay", batch)
            self.num_replays[batch] += 1
            result = self.spoils.get(batch, torch.clone)(run())
            for spoilt in self._pool:
                spoilt.fill_(torch.nan)
            return output.copy_(result)

        return replay

    def _raise(self, what: str, batch: int) -> None:
        if (error := self.fails.get((what, batch))) is not None:
            raise error
