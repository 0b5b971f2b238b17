"""Whoever takes requests needs the engine and the LoRAs that requests ask for: both, as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from dmd2.engine.delivery import Space
from dmd2.engine.job import GenerationResult
from dmd2.engine.opening import open_engine
from dmd2.errors import DeadlineError
from dmd2.loras.fetching import LoraFetcher
from dmd2.loras.library import LoraLibrary
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraInputs, LoraUse
from dmd2.settings import Settings


class Service:
    """An engine that is ready to serve, and where its requests' LoRAs come from.

    Args:
        settings: of the process.
        space: what bounds the bytes that all files take; None for no bound.

    Attributes:
        engine: that runs the requests; whoever made this closes it.
        card: of its model.

    Raises:
        DMD2Error: the engine cannot be opened.
    """

    def __init__(self, settings: Settings, space: Space | None = None) -> None:
        self.engine = open_engine(settings, space)
        self.card = self.engine.card
        self._loras = LoraLibrary(LoraFetcher(settings), self.engine.lora_names)
        self._queue_timeout_s = settings.queue_timeout_s

    async def generate(self, request: GenerationRequest, loras: LoraInputs) -> GenerationResult:
        """Get a request's LoRAs, and run it; if the caller is cancelled, both stop.

        Raises:
            InvalidRequestError: a LoRA is not allowed, not there, or none for this model; or the
                files could be more than all outputs may be.
            DownloadError: there is no room to keep a LoRA.
            GenerationError: the request could not be finished in time, or at all, or every image
                was withheld.
        """
        async with self._fetched(loras) as uses:
            return await self.engine.generate(replace(request, loras=uses))

    @asynccontextmanager
    async def _fetched(self, inputs: LoraInputs) -> AsyncIterator[tuple[LoraUse, ...]]:
        limit_s = self._queue_timeout_s
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(limit_s):
                    loras = await stack.enter_async_context(self._loras.using(inputs))
            except TimeoutError:
                raise DeadlineError(
                    f"{' and '.join(inputs.wanted)} took longer to get than DMD2_QUEUE_TIMEOUT_S, "
                    f"which is {limit_s:g}"
                ) from None
            yield loras
