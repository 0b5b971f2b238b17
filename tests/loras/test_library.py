"""A request's LoRAs, from its inputs to what is added to the model."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drawn_loras import low_rank
from safetensors.torch import save_file

from dmd2.errors import InvalidRequestError
from dmd2.loras import library as library_module
from dmd2.loras.fetching import LoraFetcher
from dmd2.loras.library import LoraLibrary
from dmd2.loras.names import ModuleNames
from dmd2.request.lora_rules import LoraInputs, LoraUse
from dmd2.settings import Settings

MODULE = "mid_block_attentions_0_proj_in"
ONE, TWO, THREE = (LoraInputs(f"{number}.safetensors") for number in (1, 2, 3))
WAIT_S = 20


@pytest.fixture
def folder(tmp_path: Path, names: ModuleNames) -> Path:
    (name,) = [n for n in names.shapes["unet"] if n.replace(".", "_") == f"{MODULE}_weight"]
    for number in (1, 2, 3):
        lora = low_rank({f"lora_unet_{MODULE}": names.shapes["unet"][name]}, 2, 1.0, number)
        save_file(lora, tmp_path / f"{number}.safetensors")
    save_file({"strange.key": torch.ones(2)}, tmp_path / "strange.safetensors")
    return tmp_path


@pytest.fixture
def fetcher(folder: Path) -> LoraFetcher:
    return LoraFetcher(Settings("m", lora_sources=("local",), lora_dir=folder))


class Reader:
    """Notes what is read; a file whose name it holds back has to wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.held_back, self.let = "", threading.Event()
        self._read_lora = library_module.read_lora
        monkeypatch.setattr(library_module, "read_lora", self)

    def __call__(self, path: Path, *args: Any) -> Any:
        self.names.append(path.stem)
        assert path.stem != self.held_back or self.let.wait(WAIT_S)
        return self._read_lora(path, *args)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(monkeypatch)


async def get(library: LoraLibrary, inputs: LoraInputs) -> tuple[LoraUse, ...]:
    async with asyncio.timeout(WAIT_S), library.using(inputs) as loras:
        return loras


class Request:
    """One that uses its LoRAs until it is told to end."""

    def __init__(self, library: LoraLibrary, inputs: LoraInputs) -> None:
        self.has_them, self.may_end = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._run(library, inputs))

    async def _run(self, library: LoraLibrary, inputs: LoraInputs) -> None:
        async with library.using(inputs):
            self.has_them.set()
            await self.may_end.wait()

    async def starts(self) -> None:
        await asyncio.wait_for(self.has_them.wait(), WAIT_S)

    async def waits(self) -> bool:
        """Whether it has nothing yet, though every other has had time to do what it does."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.has_them.wait(), 0.2)
        return not self.has_them.is_set()

    async def ends(self) -> None:
        self.may_end.set()
        await asyncio.wait_for(self.task, WAIT_S)


def test_both_are_read_and_keep_their_order(fetcher: LoraFetcher, names: ModuleNames) -> None:
    library = LoraLibrary(fetcher, names)
    inputs = LoraInputs("2.safetensors", 0.5, "1.safetensors", -1.0)
    first, second = asyncio.run(get(library, inputs))
    assert [(u.name, u.scale) for u in (first, second)] == [("2", 0.5), ("1", -1.0)]
    assert first.sha256 != second.sha256
    assert list(first.deltas["unet"]) == list(second.deltas["unet"])
    assert asyncio.run(get(library, LoraInputs())) == ()


def test_the_field_of_a_bad_file_is_named_and_it_takes_no_room(
    fetcher: LoraFetcher, names: ModuleNames
) -> None:
    library = LoraLibrary(fetcher, names, max_bytes=0)
    with pytest.raises(InvalidRequestError, match=r"strange\.key") as caught:
        asyncio.run(get(library, LoraInputs("1.safetensors", None, "strange.safetensors")))
    assert caught.value.field == "extra_lora"
    assert len(asyncio.run(get(library, TWO))) == 1


def test_a_file_is_read_once_while_there_is_room_for_it(
    fetcher: LoraFetcher, names: ModuleNames, reader: Reader
) -> None:
    roomy, narrow = LoraLibrary(fetcher, names), LoraLibrary(fetcher, names, max_bytes=0)
    for library, expected in ((roomy, ["1", "2"]), (narrow, ["1", "2", "1"])):
        reader.names.clear()
        for inputs in (ONE, ONE, TWO, ONE):
            asyncio.run(get(library, inputs))
        assert reader.names == expected


def test_requests_wait_for_memory_in_their_order(
    fetcher: LoraFetcher, names: ModuleNames, folder: Path, reader: Reader
) -> None:
    """Two files fit; nobody overtakes whoever needs more, and who is cancelled waits no more."""

    async def main() -> None:
        size = (folder / "1.safetensors").stat().st_size
        library = LoraLibrary(fetcher, names, max_bytes=2 * size)
        first, same = Request(library, ONE), Request(library, ONE)
        await first.starts()
        await same.starts()
        both = Request(library, LoraInputs("2.safetensors", None, "3.safetensors"))
        assert await both.waits()
        behind = Request(library, TWO)
        assert await behind.waits()
        assert reader.names == ["1"], "nothing is read for those who wait"
        await first.ends()
        assert await both.waits(), "another request uses it still"
        await same.ends()
        await both.starts()
        await behind.starts()
        assert reader.names == ["1", "2", "3"]
        given_up = Request(library, ONE)
        assert await given_up.waits()
        last = Request(library, THREE)
        assert await last.waits()
        given_up.task.cancel()
        await last.starts()
        await asyncio.gather(both.ends(), behind.ends(), last.ends())

    asyncio.run(main())


def test_what_is_too_large_for_all_room_has_it_alone(
    fetcher: LoraFetcher, names: ModuleNames
) -> None:
    async def main() -> None:
        library = LoraLibrary(fetcher, names, max_bytes=1)
        first = Request(library, ONE)
        await first.starts()
        second = Request(library, TWO)
        assert await second.waits()
        await first.ends()
        await second.starts()
        await second.ends()

    asyncio.run(main())


def test_what_was_read_waits_for_no_file_that_is_being_read(
    fetcher: LoraFetcher, names: ModuleNames, reader: Reader
) -> None:
    async def main() -> None:
        library = LoraLibrary(fetcher, names)
        await get(library, ONE)
        reader.held_back = "2"
        slow, likewise = Request(library, TWO), Request(library, TWO)
        assert await slow.waits()
        assert len(await asyncio.wait_for(get(library, ONE), WAIT_S)) == 1
        assert await likewise.waits()
        reader.let.set()
        await asyncio.gather(slow.ends(), likewise.ends())
        assert reader.names == ["1", "2"], "for both of them"

    asyncio.run(main())


def test_a_file_that_is_replaced_after_it_was_hashed_is_not_taken_for_the_other(
    fetcher: LoraFetcher, names: ModuleNames, folder: Path
) -> None:
    class Replaced(LoraFetcher):
        def get(self, *args: Any, **kwargs: Any) -> Any:
            file = super().get(*args, **kwargs)
            (folder / "2.safetensors").replace(folder / "1.safetensors")
            return file

    fetcher.__class__ = Replaced
    library = LoraLibrary(fetcher, names)
    with pytest.raises(InvalidRequestError, match=r"changed while it was read\. Ask again"):
        asyncio.run(get(library, ONE))
    fetcher.__class__ = LoraFetcher
    assert len(asyncio.run(get(library, ONE))) == 1


def test_a_request_that_is_cancelled_ends_its_transfer(names: ModuleNames) -> None:
    began, ended = threading.Event(), threading.Event()

    def get_file(field: str, text: str, cancelled: threading.Event, **tokens: str) -> None:
        began.set()
        assert cancelled.wait(10)
        ended.set()
        raise CancelledError

    async def main() -> None:
        fetcher: Any = SimpleNamespace(get=get_file)
        task = asyncio.create_task(get(LoraLibrary(fetcher, names), LoraInputs("owner/repo")))
        await asyncio.to_thread(began.wait, 10)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended.wait(10)
