"""What the gateway knows of a prediction under way, beyond the prediction itself."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from deploy.gateway.keeping.kept_work import KeptWork
from deploy.gateway.prediction import Event, Prediction, Status
from deploy.gateway.work import Outcome


@dataclass(frozen=True)
class End:
    """How a prediction ends."""

    status: Status
    outcome: Outcome

    @classmethod
    def of(cls, outcome: Outcome) -> End:
        """What an engine's outcome makes of it."""
        return cls("succeeded" if outcome.error is None else "failed", outcome)


CANCELED = End("canceled", Outcome())


@dataclass(eq=False)
class Life:
    """A prediction under way.

    Attributes:
        prediction: the one.
        place: in the order of acceptance.
        kept: what the journal has of its work, where an earlier gateway accepted it.
        stage: "arriving" until it is in the line, "ending" from when its end is being written.
        last_word: the end that the gateway itself has decided on, whatever an engine may say.
        timer: of its deadline.
        task: that sees to it.
        run: the part of that which a cancellation ends.
    """

    prediction: Prediction
    place: int
    kept: KeptWork | None = None
    stage: Literal["arriving", "under way", "ending"] = "arriving"
    last_word: End | None = None
    timer: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] | None = None
    run: asyncio.Task[Outcome] | None = None

    @property
    def num_attempts(self) -> int:
        """How often an engine was given it."""
        return self.prediction.num_attempts

    def begin_attempt(self) -> bool:
        """Count one more time that an engine is given it; whether that is the first."""
        self.prediction.num_attempts += 1
        is_first = self.prediction.started_at is None
        if is_first:
            self.prediction.status, self.prediction.started_at = "processing", datetime.now(UTC)
        return is_first

    def ended(self, end: End) -> Prediction:
        """The prediction as it is to be after its end, which this leaves as it is."""
        metrics = {**end.outcome.metrics, "attempts": self.num_attempts}
        return replace(
            self.prediction,
            status=end.status,
            outcome=replace(end.outcome, metrics=metrics),
            completed_at=datetime.now(UTC),
        )

    def disarm(self) -> None:
        """Let its deadline pass unnoticed."""
        if self.timer is not None:
            self.timer.cancel()

    def become(self, ended: Prediction) -> None:
        """Let those who hold the prediction know its end."""
        prediction = self.prediction
        prediction.status, prediction.outcome = ended.status, ended.outcome
        prediction.files, prediction.completed_at = ended.files, ended.completed_at
        prediction.ended.set()

    def events_of_end(self) -> tuple[Event, ...]:
        """What a prediction that is over has to tell of."""
        outcome = self.prediction.outcome or Outcome()
        output: tuple[Event, ...] = ("output",) if outcome.outputs else ()
        logs: tuple[Event, ...] = ("logs",) if outcome.logs else ()
        return (*output, *logs, "completed")
