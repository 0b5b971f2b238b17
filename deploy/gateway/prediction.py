"""One prediction: what was asked, by which dialect, and what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from deploy.gateway.work import Outcome, Work

Dialect = Literal["cog", "replicate"]
Status = Literal["starting", "processing", "succeeded", "failed", "canceled"]
Event = Literal["start", "output", "logs", "completed"]
EVENTS: tuple[Event, ...] = ("start", "output", "logs", "completed")
TERMINAL: tuple[Status, ...] = ("succeeded", "failed", "canceled")


@dataclass(frozen=True)
class Webhook:
    """Who wants to be told.

    Attributes:
        url: of the receiver.
        events: that it wants.
    """

    url: str
    events: tuple[Event, ...] = EVENTS


@dataclass(eq=False)
class Prediction:
    """A request on its way through the gateway. Only the event loop touches it.

    Attributes:
        id: `[A-Za-z0-9_-]{1,64}`.
        dialect: that it came in.
        inputs: as the caller gave them, without those that are unknown, tokens as "[REDACTED]".
        work: what an engine is asked; None where this was read from the journal and is over.
        model, version: of Replicate's dialect, as the answer says them.
        webhook: who wants to be told.
        is_journaled: whether it outlives the gateway.
        created_at, started_at, completed_at: in UTC.
        status: where it stands; "processing" from the first time that an engine has it.
        outcome: from the engine, or from the gateway where no engine had a last word. Of what was
            journaled, the outputs may be in files, whose names `files` has.
        files: the outputs' names in the journal's folder, in order.
        is_removed: whether those have been deleted since, by their age.
        num_attempts: how often an engine was given it; a try that the gateway's end cut counts
            where the engine may have been that end.
        ended: set at the end.
    """

    id: str
    dialect: Dialect
    inputs: Mapping[str, Any]
    work: Work | None
    model: str = ""
    version: str = ""
    webhook: Webhook | None = None
    is_journaled: bool = False
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    started_at: datetime | None = None
    completed_at: datetime | None = None
    status: Status = "starting"
    outcome: Outcome | None = None
    files: tuple[str, ...] = ()
    is_removed: bool = False
    num_attempts: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_over(self) -> bool:
        """Whether it has come to its end."""
        return self.status in TERMINAL
