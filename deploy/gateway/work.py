"""What the gateway asks of an engine, wherever that runs, and what it hears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraInputs


@dataclass(frozen=True)
class Work:
    """A request that can be done again, on any engine, with the same pixels.

    Attributes:
        id: of the prediction, for the engine's log.
        request: every field is settled, the seed too; its loras are fetched by the engine.
        loras: where they are. May hold tokens, and so is neither written nor logged.
    """

    id: str
    request: GenerationRequest
    loras: LoraInputs = field(default_factory=LoraInputs)


@dataclass(frozen=True)
class Outcome:
    """What an engine says of some work in the end; its word is final.

    Attributes:
        outputs: of each image that was not withheld its file, as an ASCII `data:` URL.
        error: why there are none; None where there are.
        logs: the lines that a prediction's logs hold, each with its newline.
        metrics: as the container reports them.
    """

    outputs: tuple[bytes, ...] = ()
    error: str | None = None
    logs: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)


class EngineDiedError(Exception):
    """The engine that had the work is gone, or cannot be reached; another may do it."""


class Engines(Protocol):
    """All engines that a gateway has, all of the same model.

    Attributes:
        num_ready: how many take work now.
        capacity: how much work they may have together at any time, by which they are kept busy.
        is_in_process: whether they live in the gateway's own process, so that the death of an
            engine is the gateway's too: a try that the gateway's end cuts may be what ended it.
    """

    num_ready: int
    capacity: int
    is_in_process: bool

    async def card(self) -> ModelCard:
        """The model's, once an engine is ready.

        Raises:
            ModelError: no engine can be opened.
        """

    async def run(self, work: Work) -> Outcome:
        """Have it done by the engine that has the least to do.

        Whoever cancels this ends the work too, before its next step.

        Raises:
            EngineDiedError: before the end of the work.
        """

    async def changed(self) -> None:
        """Return at the next change of num_ready or capacity after this was called.

        Who waits for room learns by this that there is some. An asyncio.Event that each change
        sets, and puts a new one in place of, does it.
        """

    async def close(self) -> None:
        """End all engines."""
