"""How long a request may wait and run."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from dmd2.errors import DeadlineError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Deadlines:
    """How long a request may take.

    Attributes:
        queue_s: until its first step begins.
        run_s: from then on.
    """

    queue_s: float = math.inf
    run_s: float = math.inf


async def within(seconds: float, future: Future[Result], verb: str, setting: str) -> Result:
    """What the future brings, or a DeadlineError."""
    try:
        async with asyncio.timeout(None if seconds == math.inf else seconds) as timeout:
            return await asyncio.wrap_future(future)
    except TimeoutError as error:
        if not timeout.expired():
            raise
        raise DeadlineError(
            f"the request {verb} for {seconds:g} s, the server's limit ({setting}), and was given "
            "up. Ask again when there is less to do, or for a smaller image"
        ) from error
