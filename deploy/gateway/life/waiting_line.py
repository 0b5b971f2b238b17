"""Whose turn it is: in the order of acceptance, and alone after two tries that an engine's end cut.

One request that ends its engine takes all others of that engine with it. So the third try of each
is made while nothing else is under way: if an engine ends then, it was that one, or the machine.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

MAX_ATTEMPTS = 3


class Waiting(Protocol):
    """What stands in a line.

    Attributes:
        place: in the order of acceptance.
        num_attempts: how often it was taken.
    """

    place: int

    @property
    def num_attempts(self) -> int:
        """See above."""


T = TypeVar("T", bound=Waiting)


class WaitingLine(Generic[T]):
    """Who waits for an engine, and who is with one.

    Attributes:
        fresh: those that wait for their first or second try, in order.
        suspects: those that wait for their last try, in order; they go before the others, whom
            they are older than, one at a time and with nothing beside them.
        running: those that were taken and have not left.
    """

    def __init__(self) -> None:
        self.fresh: list[T] = []
        self.suspects: list[T] = []
        self.running: set[T] = set()
        self._is_alone = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self.fresh) + len(self.suspects)

    def put(self, one: T) -> None:
        """Let it wait, at its old place if it was taken before; it is running no more."""
        self.leave(one)
        insort(self._line_of(one), one, key=attrgetter("place"))

    def remove(self, one: T) -> bool:
        """Let it wait no more; whether it did."""
        line = self._line_of(one)
        if one not in line:
            return False
        line.remove(one)
        return True

    def room(self, capacity: int) -> int:
        """How many more could be taken at once, were there enough of them."""
        if self._is_alone or self.suspects:
            return 0
        return max(0, capacity - len(self.running))

    def take(self, capacity: int) -> T | None:
        """The next one, running from now on; None where nobody's turn has come.

        Args:
            capacity: how many may be running.
        """
        if self.suspects and not self.running and capacity > 0:
            self._is_alone = True
            return self._run(self.suspects)
        return self._run(self.fresh) if self.fresh and self.room(capacity) else None

    def leave(self, one: T) -> None:
        """It is running no more, if it was."""
        if one in self.running:
            self.running.remove(one)
            self._is_alone = False

    def _line_of(self, one: T) -> list[T]:
        return self.suspects if is_last_try(one) else self.fresh

    def _run(self, line: list[T]) -> T:
        self.running.add(line[0])
        return line.pop(0)


def is_last_try(one: Waiting) -> bool:
    """Whether the next try of this is its last."""
    return one.num_attempts >= MAX_ATTEMPTS - 1
