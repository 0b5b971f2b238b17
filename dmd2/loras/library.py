"""From what a request says of LoRAs to what is added to the model's weights: fetched and read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import TypeVar

from dmd2.errors import DownloadError, LoraError
from dmd2.loras.fetching import LoraFetcher, LoraFile
from dmd2.loras.formats import Lora, read_lora
from dmd2.loras.names import ModuleNames
from dmd2.loras.shelf import Shelf
from dmd2.request.lora_rules import LoraInputs, LoraUse

# A file that is fetched holds a thread for minutes, in which it mostly waits.
_MAX_FETCHES = 32
# Of what requests under way use, and of what was read for others and may be asked for again.
_MAX_BYTES = 4_000_000_000
Result = TypeVar("Result")


class LoraLibrary:
    """The LoRAs that requests ask for, ready to be merged; those read last are kept.

    Neither the event loop that asks it nor the device waits for it. Files are read by one thread,
    since each thread that runs torch's CPU kernels has workers of its own, which slow the others
    down.

    Args:
        fetcher: gets their files.
        names: of the modules of the model that they are for.
        max_bytes: of the host's memory, for files that requests use and files that are kept.
            Requests wait for it, those that came first go first; one alone has what it needs.
    """

    def __init__(
        self, fetcher: LoraFetcher, names: ModuleNames, max_bytes: int = _MAX_BYTES
    ) -> None:
        self._fetcher, self._names = fetcher, names
        self._shelf: Shelf[Lora] = Shelf(max_bytes)
        self._fetchers = ThreadPoolExecutor(_MAX_FETCHES, "dmd2-lora-fetch")
        self._reader = ThreadPoolExecutor(1, "dmd2-lora-read")
        self._reading = asyncio.Lock()

    @asynccontextmanager
    async def using(self, inputs: LoraInputs) -> AsyncIterator[tuple[LoraUse, ...]]:
        """The LoRAs that a request asks for, in the order in which they are added, for its time.

        Whoever is cancelled ends the transfer of a file that nobody else waits for.

        Raises:
            InvalidRequestError: one is not allowed, not there, or no LoRA for this model.
            DownloadError: there is no room to keep it.
        """
        with ExitStack() as in_use:
            with ExitStack() as until_read:
                files = await self._fetch(inputs, until_read)
                sizes = {file.sha256: file.num_bytes for file in files.values()}
                await self._shelf.take(sizes)
                in_use.callback(self._shelf.give_back, sizes)
                loras = [await self._read(field, files) for field in files]
            scales = [scale for _, scale in inputs.wanted.values()]
            yield tuple(
                LoraUse(file.name, file.sha256, scale, lora.deltas)
                for file, scale, lora in zip(files.values(), scales, loras, strict=True)
            )

    async def _fetch(self, inputs: LoraInputs, stack: ExitStack) -> dict[str, LoraFile]:
        """The file that each input means, as long as the stack is open."""
        cancelled = threading.Event()
        get = partial(
            self._fetcher.get,
            cancelled=cancelled,
            hf_api_token=inputs.hf_api_token,
            civitai_api_token=inputs.civitai_api_token,
        )
        try:
            return {
                field: stack.enter_context(
                    await _in(self._fetchers, partial(get, field, text), cancelled)
                )
                for field, (text, _) in inputs.wanted.items()
            }
        finally:
            cancelled.set()

    async def _read(self, field: str, files: Mapping[str, LoraFile]) -> Lora:
        """What a file adds; what was read is there at once, whatever is being read meanwhile."""
        file = files[field]
        if (lora := self._shelf.find(file.sha256)) is not None:
            return lora
        same = [each for each in files.values() if each.sha256 == file.sha256]
        read = partial(_read_or_discard, same, self._names)
        try:
            async with self._reading:
                # Whoever read before may have read the same.
                lora = self._shelf.find(file.sha256)
                return lora or self._shelf.put(file.sha256, await _in(self._reader, read))
        except LoraError as error:
            raise error.of_field(field, file.name) from None
        except OSError as error:
            raise DownloadError(f"{field} could not be read: {error}") from error


def _read_or_discard(same: Sequence[LoraFile], names: ModuleNames) -> Lora:
    """What a file adds, which a request may have twice; one that is refused is not kept."""
    try:
        return read_lora(same[0].path, names, same[0].sha256)
    except LoraError:
        for each in same:
            each.discard()
        raise


async def _in(
    pool: ThreadPoolExecutor,
    work: Callable[[], Result],
    cancelled: threading.Event | None = None,
) -> Result:
    """What work returns on a pool's thread; a file that it returns to nobody is closed."""

    def run() -> Result:
        result = work()
        if cancelled is not None and cancelled.is_set() and isinstance(result, LoraFile):
            result.close()
        return result

    return await asyncio.get_running_loop().run_in_executor(pool, run)
