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
from dmd2.request.lora_rules import LoraInputs
from dmd2.settings import Settings

MODULE = "mid_block_attentions_0_proj_in"


@pytest.fixture
def folder(tmp_path: Path, names: ModuleNames) -> Path:
    (name,) = [n for n in names.shapes["unet"] if n.replace(".", "_") == f"{MODULE}_weight"]
    for number in (1, 2):
        lora = low_rank({f"lora_unet_{MODULE}": names.shapes["unet"][name]}, 2, 1.0, number)
        save_file(lora, tmp_path / f"{number}.safetensors")
    save_file({"strange.key": torch.ones(2)}, tmp_path / "strange.safetensors")
    return tmp_path


@pytest.fixture
def fetcher(folder: Path) -> LoraFetcher:
    return LoraFetcher(Settings("m", lora_sources=("local",), lora_dir=folder))


def test_both_are_read_and_keep_their_order(fetcher: LoraFetcher, names: ModuleNames) -> None:
    library = LoraLibrary(fetcher, names)
    inputs = LoraInputs("2.safetensors", 0.5, "1.safetensors", -1.0)
    first, second = asyncio.run(library.get(inputs))
    assert [(u.name, u.scale) for u in (first, second)] == [("2", 0.5), ("1", -1.0)]
    assert first.sha256 != second.sha256
    assert list(first.deltas["unet"]) == list(second.deltas["unet"])
    assert asyncio.run(library.get(LoraInputs())) == ()


def test_the_field_of_a_bad_file_is_named(fetcher: LoraFetcher, names: ModuleNames) -> None:
    library = LoraLibrary(fetcher, names)
    with pytest.raises(InvalidRequestError, match=r"strange\.key") as caught:
        asyncio.run(library.get(LoraInputs("1.safetensors", None, "strange.safetensors")))
    assert caught.value.field == "extra_lora"


def test_a_file_is_read_once_while_there_is_room_for_it(
    fetcher: LoraFetcher, names: ModuleNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def read_lora(path: Path, names: ModuleNames) -> Any:
        read.append(path.stem)
        return original(path, names)

    original = library_module.read_lora
    monkeypatch.setattr(library_module, "read_lora", read_lora)
    roomy, narrow = LoraLibrary(fetcher, names), LoraLibrary(fetcher, names, max_bytes=0)
    for library, expected in ((roomy, ["1", "2"]), (narrow, ["1", "2", "1"])):
        read.clear()
        for name in ("1", "1", "2", "1"):
            asyncio.run(library.get(LoraInputs(f"{name}.safetensors")))
        assert read == expected


def test_a_request_that_is_cancelled_ends_its_transfer(names: ModuleNames) -> None:
    began, ended = threading.Event(), threading.Event()

    def get(field: str, text: str, cancelled: threading.Event, **tokens: str) -> None:
        began.set()
        assert cancelled.wait(10)
        ended.set()
        raise CancelledError

    async def run() -> None:
        task = asyncio.create_task(LoraLibrary(fetcher, names).get(LoraInputs("owner/repo")))
        await asyncio.to_thread(began.wait, 10)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    fetcher: Any = SimpleNamespace(get=get)
    asyncio.run(run())
    assert ended.wait(10)
