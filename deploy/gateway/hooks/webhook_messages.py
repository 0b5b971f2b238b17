"""What waits to be told, and how much of it may."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from deploy.gateway.hooks.webhook_hosts import Receiver
from deploy.gateway.prediction import Event, Prediction


@dataclass(frozen=True)
class Pace:
    """How much is sent, and how often.

    Attributes:
        news_every_s: between two messages of output or logs of a prediction; those between are
            left out, as what they say is in the next one too.
        first_retry_s, last_retry_s: between two tries of a message; twice as long each time.
        retry_for_s: the sum of those, after which a message is given up.
        at_once: messages on their way to each host of the list.
        max_waiting: messages that wait or are on their way, for each of those.
        max_bytes: of outputs that are in memory alone, which those messages hold.
    """

    news_every_s: float = 0.5
    first_retry_s: float = 1.0
    last_retry_s: float = 60.0
    retry_for_s: float = 300.0
    at_once: int = 16
    max_waiting: int = 4096
    max_bytes: int = 64_000_000

    def pauses_s(self) -> Iterator[float]:
        """How long to wait after each try of a message that must arrive."""
        pause_s, total_s = self.first_retry_s, self.first_retry_s
        while total_s <= self.retry_for_s:
            yield pause_s
            pause_s = min(2 * pause_s, self.last_retry_s)
            total_s += pause_s


@dataclass(frozen=True)
class Message:
    """One thing to tell.

    Attributes:
        id: the same for each try, and after a restart.
        event: that it tells of.
        prediction: as it stood then.
        receiver: whom to tell.
    """

    id: str
    event: Event
    prediction: Prediction
    receiver: Receiver

    @property
    def num_bytes(self) -> int:
        """Of outputs that are nowhere else."""
        outcome = self.prediction.outcome
        return sum(map(len, outcome.outputs)) if outcome is not None else 0


@dataclass(eq=False)
class Line:
    """The messages of one prediction that are yet to be sent, in order.

    Attributes:
        task: that sends them, while there are some.
        num_told: how many there were.
        news_at: when there was one of output or logs, by the loop's clock; None before.
        has_end: whether the last one was among them.
        lacks_end: whether that was left out, to be told later.
    """

    messages: deque[Message] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None
    num_told: int = 0
    news_at: float | None = None
    has_end: bool = False
    lacks_end: bool = False


class Backlog:
    """What waits for one host."""

    def __init__(self, pace: Pace) -> None:
        self.slots = asyncio.Semaphore(pace.at_once)
        self._pace, self._num_waiting, self._num_bytes = pace, 0, 0

    @property
    def is_low(self) -> bool:
        """Whether much more may wait."""
        return self._num_waiting <= self._pace.max_waiting // 2

    def take(self, message: Message) -> bool:
        """Count a message, if there is room for it; whether there is."""
        num_bytes = self._num_bytes + message.num_bytes
        if self._num_waiting >= self._pace.max_waiting or num_bytes > self._pace.max_bytes:
            return False
        self._num_waiting, self._num_bytes = self._num_waiting + 1, num_bytes
        return True

    def leave(self, message: Message) -> None:
        """Count it no more."""
        self._num_waiting -= 1
        self._num_bytes -= message.num_bytes


def as_it_stands(prediction: Prediction) -> Prediction:
    """What its further life does not change; outputs that are kept in files are not in it."""
    outcome = prediction.outcome
    if outcome is not None and prediction.files:
        outcome = replace(outcome, outputs=())
    return replace(prediction, outcome=outcome, work=None)
