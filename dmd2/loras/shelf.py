"""What was read, in the host's memory: what is in use, and what may be asked for again."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Generic, TypeVar

Content = TypeVar("Content")


class Shelf(Generic[Content]):
    """Contents by name, within a bound of bytes; one event loop uses it.

    Args:
        max_bytes: of all that is there. What is in use is never put away for others, who wait; who
            finds nothing in use gets room for as much as it wants.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._contents: dict[str, Content] = {}
        # Of what is there or about to be, beginning with what was taken longest ago.
        self._nbytes: OrderedDict[str, int] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    async def take(self, nbytes: Mapping[str, int]) -> None:
        """Wait for room for all of these, to be given back together; whoever came first is first.

        So nobody holds a part of what it needs while it waits, and what is large has its turn.
        """
        async with self._turn:
            while not self._fits(nbytes):
                self._freed.clear()
                await self._freed.wait()
            for name, size in nbytes.items():
                self._nbytes[name] = size
                self._nbytes.move_to_end(name)
            self._users.update(nbytes.keys())
            self._put_away()

    def give_back(self, nbytes: Mapping[str, int]) -> None:
        """Let go of what was taken; it stays until others need the room."""
        self._users -= Counter(nbytes.keys())
        for name in nbytes.keys() - self._users.keys() - self._contents.keys():
            del self._nbytes[name]
        self._freed.set()

    def find(self, name: str) -> Content | None:
        """What was put there by that name."""
        return self._contents.get(name)

    def put(self, name: str, content: Content) -> Content:
        """Fill room that was taken."""
        self._contents[name] = content
        return content

    def _fits(self, nbytes: Mapping[str, int]) -> bool:
        in_use = {name: self._nbytes[name] for name in self._users}
        return not in_use or sum({**in_use, **nbytes}.values()) <= self._max_bytes

    def _put_away(self) -> None:
        idle = [name for name in self._nbytes if name not in self._users]
        while idle and sum(self._nbytes.values()) > self._max_bytes:
            name = idle.pop(0)
            del self._nbytes[name], self._contents[name]
