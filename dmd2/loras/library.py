"""From what a request says of LoRAs to what is added to the model's weights: fetched and read."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from dmd2.errors import DownloadError, LoraError
from dmd2.loras.fetching import LoraFetcher, LoraFile
from dmd2.loras.formats import Lora, read_lora
from dmd2.loras.names import ModuleNames
from dmd2.request.lora_rules import LoraInputs, LoraUse

# A file that is fetched holds a thread for minutes, in which it mostly waits.
_MAX_FETCHES = 32
# Of files that were read and may be asked for again, in the host's memory.
_MAX_BYTES = 1_000_000_000
Result = TypeVar("Result")


class LoraLibrary:
    """The LoRAs that requests ask for, ready to be merged; those read last are kept.

    Neither the event loop nor the device waits for it. Files are read by one thread, since each
    thread that runs torch's CPU kernels has workers of its own, which slow the others down.

    Args:
        fetcher: gets their files.
        names: of the modules of the model that they are for.
        max_bytes: of files that are kept; one is in any case.
    """

    def __init__(
        self, fetcher: LoraFetcher, names: ModuleNames, max_bytes: int = _MAX_BYTES
    ) -> None:
        self._fetcher, self._names, self._max_bytes = fetcher, names, max_bytes
        self._read: OrderedDict[str, Lora] = OrderedDict()
        self._fetchers = ThreadPoolExecutor(_MAX_FETCHES, "dmd2-lora-fetch")
        self._reader = ThreadPoolExecutor(1, "dmd2-lora-read")

    async def get(self, inputs: LoraInputs) -> tuple[LoraUse, ...]:
        """The LoRAs that a request asks for, in the order in which they are added.

        Whoever is cancelled ends the transfer of a file that nobody else waits for.

        Raises:
            InvalidRequestError: one is not allowed, not there, or no LoRA for this model.
            DownloadError: there is no room to keep it.
        """
        cancelled = threading.Event()
        try:
            return tuple(
                [
                    await self._use(inputs, field, text, scale, cancelled)
                    for field, (text, scale) in inputs.wanted.items()
                ]
            )
        finally:
            cancelled.set()

    async def _use(
        self, inputs: LoraInputs, field: str, text: str, scale: float, cancelled: threading.Event
    ) -> LoraUse:
        fetch = partial(
            self._fetcher.get,
            field,
            text,
            cancelled,
            hf_api_token=inputs.hf_api_token,
            civitai_api_token=inputs.civitai_api_token,
        )
        file = await _in(self._fetchers, fetch, cancelled)
        try:
            lora = await _in(self._reader, partial(self._content, file), cancelled)
        except LoraError as error:
            raise error.of_field(field, file.name) from None
        except OSError as error:
            raise DownloadError(f"{field} could not be read: {error}") from error
        return LoraUse(file.name, file.sha256, scale, lora.deltas)

    def _content(self, file: LoraFile) -> Lora:
        """On the reading thread."""
        with file:
            if file.sha256 not in self._read:
                self._read[file.sha256] = read_lora(file.path, self._names)
        self._read.move_to_end(file.sha256)
        while len(self._read) > 1 and sum(map(_nbytes, self._read.values())) > self._max_bytes:
            self._read.popitem(last=False)
        return self._read[file.sha256]


async def _in(
    pool: ThreadPoolExecutor, work: Callable[[], Result], cancelled: threading.Event
) -> Result:
    """What work returns on a pool's thread; what it returns to nobody is closed."""

    def run() -> Result:
        result = work()
        if cancelled.is_set() and isinstance(result, LoraFile):
            result.close()
        return result

    return await asyncio.get_running_loop().run_in_executor(pool, run)


def _nbytes(lora: Lora) -> int:
    deltas = (delta for each in lora.deltas.values() for delta in each.values())
    return sum(part.nbytes for delta in deltas for part in delta.parts.values())
