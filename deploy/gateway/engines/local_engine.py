"""The one engine of a gateway without Ray, in the gateway's own process."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from deploy.gateway.engines.engine_host import EngineHost
from deploy.gateway.work import Outcome, Work
from dmd2.errors import ModelError
from dmd2.model_card import ModelCard
from dmd2.settings import Settings

log = logging.getLogger(__name__)

# Some 16 batches of the usual 4: of different sizes too enough wait to fill the next batch, and
# what waits here costs no more than what waits in the gateway's line.
CAPACITY = 64
_LOOK_S = 1.0


class LocalEngine:
    """One engine as `work.Engines`: loaded on a thread of its own, from `card` on.

    Args:
        settings: of the engine.
        open_host: loads the model.

    Attributes:
        num_ready: 1 while it takes work, else 0.
        capacity: CAPACITY while it takes work, else 0.
    """

    is_in_process = True

    def __init__(
        self, settings: Settings, open_host: Callable[[Settings], EngineHost] = EngineHost
    ) -> None:
        self.num_ready = self.capacity = 0
        self._settings, self._open_host = settings, open_host
        self._changed = asyncio.Event()
        self._opening: asyncio.Task[EngineHost] | None = None
        self._looking: asyncio.Task[None] | None = None

    async def card(self) -> ModelCard:
        """The model's, once it is loaded.

        Raises:
            ModelError: it cannot be, and the message says why.
        """
        return (await self._host()).card

    async def run(self, work: Work) -> Outcome:
        """Have it done; whoever cancels this ends the work before its next step."""
        return await (await self._host()).run(work)

    async def changed(self) -> None:
        """Return once the engine takes work that took none, or the other way round."""
        await self._changed.wait()

    async def close(self) -> None:
        """End the engine, unless its model is still being loaded: that ends with the process."""
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking
        if self._opening is not None and self._opening.done() and not self._opening.exception():
            await asyncio.to_thread(self._opening.result().close)

    async def _host(self) -> EngineHost:
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> EngineHost:
        opened: Future[EngineHost] = Future()

        def open_it() -> None:
            try:
                opened.set_result(self._open_host(self._settings))
            except Exception as error:  # whoever waits for it hears of it
                opened.set_exception(error)

        # A daemon, since a gateway that is told to end does not wait until a model is loaded.
        threading.Thread(target=open_it, name="dmd2-opening", daemon=True).start()
        try:
            host = await asyncio.wrap_future(opened)
        except Exception as error:
            raise ModelError(f"the engine cannot be opened: {error}") from error
        self._looking = asyncio.create_task(self._look_at(host))
        return host

    async def _look_at(self, host: EngineHost) -> None:
        """See from time to time whether it takes work."""
        while True:
            problem = await asyncio.to_thread(host.problem)
            num_ready = 0 if problem else 1
            if problem:
                log.error("unhealthy: %s", problem)
            if num_ready != self.num_ready:
                self.num_ready, self.capacity = num_ready, num_ready * CAPACITY
                self._changed.set()
                self._changed = asyncio.Event()
            await asyncio.sleep(_LOOK_S)
