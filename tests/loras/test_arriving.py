"""What a file turns out to be while it is fetched, or once it is read: whatever is refused goes."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import re
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_web import HostileWeb, Reply, forever, has_secret, lora
from safetensors.torch import save

from dmd2.errors import InvalidRequestError
from dmd2.loras.fetching import LoraFetcher, LoraFile
from dmd2.loras.header import MAX_TENSORS
from dmd2.loras.library import LoraLibrary
from dmd2.loras.names import ModuleNames
from dmd2.request.lora_rules import LoraInputs

URL = "https://files.test/style.safetensors?X-Signature=secret"
KEY = ("files.test", "/style.safetensors")
ENOUGH = 1_000_000_000
# What a host may have sent before it notices: the buffers of two sockets, and what was looked at.
MOST_SENT = 16_000_000


def get(fetcher: LoraFetcher) -> LoraFile:
    return fetcher.get("lora_weights", URL, threading.Event())


def refusal(fetcher: LoraFetcher) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        get(fetcher)
    assert not has_secret(str(caught.value))
    return str(caught.value)


def left(folder: Path) -> list[str]:
    """What a cache holds of files, whole or in part."""
    found = (folder / "cache").iterdir()
    return sorted(path.name for path in found if path.suffix in (".safetensors", ".part"))


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.safetensors", lora())
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(__file__)
    return file.getvalue()


def header(num_tensors: int, **changes: Any) -> bytes:
    """The beginning of a file of so many tensors of one number each."""
    tensors = {
        str(n): {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4], **changes}
        for n in range(num_tensors)
    }
    return with_length(json.dumps(tensors).encode())


def with_length(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def twice() -> bytes:
    (tensor,) = json.loads(header(1)[8:]).values()
    entry = f'"a": {json.dumps(tensor)}'
    return with_length(f"{{{entry}, {entry}}}".encode())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html></html>", "it is a web page"),
        (b'{"error": "x"}', "it is JSON"),
        (zipped(), "it is a zip archive"),
        (tarred(), "it is a tar archive"),
        (pickle.dumps({"a": bytes(100)}), "it is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a pointer of Git LFS"),
        (lora()[:-1], "not as long as its header says|it is cut short"),
        (lora() + b"x", "not as long as its header says"),
        (lora()[:50], "it is cut short"),
        ((16_000_001).to_bytes(8, "little") + b"{" + b" " * 100, "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"{", "it is cut short"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (lora().replace(b'"data_offsets":[0,', b'"data_offsets":[8,'), "it is malformed"),
        (with_length(b'{"a":' + b"[" * 100_000), "it is malformed"),
        (with_length(b'{"__metadata__":{}}'), "holds 0 tensors"),
    ],
)
@pytest.mark.parametrize("is_declared", [True, False])
def test_what_is_no_lora_by_its_beginning_is_not_kept(
    web: HostileWeb, tmp_path: Path, body: bytes, said: str, is_declared: bool
) -> None:
    web.answers[KEY] = Reply(body, length="true" if is_declared else None)
    assert re.search(said, refusal(web.fetcher(tmp_path)))
    assert left(tmp_path) == []


# The beginning of a file that never ends, what it declares as its length, and what is said of it.
ENDLESS = {
    "zip": (zipped(), None, "it is a zip archive"),
    "zip-of-some-length": (zipped(), ENOUGH, "it is a zip archive"),
    "pickle": (pickle.dumps({"a": bytes(100)}), None, "it is a pickle"),
    "page": (b"<!DOCTYPE html><html>" + b" " * 1000, None, "it is a web page"),
    "long-header": (
        (17_000_000).to_bytes(8, "little") + b'{"a":"',
        ENOUGH,
        "its header has 17000000 bytes",
    ),
    "many-tensors": (header(MAX_TENSORS + 1), None, f"it holds {MAX_TENSORS + 1} tensors"),
    "twice": (twice(), None, "its header is malformed"),
    "shape": (header(1, shape=[2]), None, "it is malformed"),
    "dtype": (header(1, dtype="I32"), None, "of dtype 'I32'"),
    "longer-than-its-header-says": (header(1), None, "not as long as its header says"),
    "declares-another-length": (header(1), ENOUGH, "not as long as its header says"),
}


@pytest.mark.parametrize("file", ENDLESS)
def test_what_never_ends_is_refused_at_its_beginning(
    web: HostileWeb, tmp_path: Path, file: str
) -> None:
    beginning, length, said = ENDLESS[file]
    sent = [len(beginning)]

    @forever
    def go_on(handler: Any) -> None:
        sent.append(handler.wfile.write(bytes(100_000)))

    web.answers[KEY] = Reply(beginning, length=length, then=go_on)
    assert said in refusal(web.fetcher(tmp_path, max_bytes=2 * ENOUGH))
    assert sum(sent) < MOST_SENT
    assert left(tmp_path) == []


def test_a_file_that_is_too_large_is_not_kept(web: HostileWeb, tmp_path: Path) -> None:
    web.answers[KEY] = Reply(lora(num_bytes=60_000), length=None)
    assert "more than 50000 bytes" in refusal(web.fetcher(tmp_path, max_bytes=50_000))
    assert left(tmp_path) == []


NOT_FINITE = save({"a": torch.tensor([1.0, float("nan")])})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (NOT_FINITE, "'a' is not finite"),
        (save({"a": torch.ones(0, 4), "b": torch.ones(1)}), "'a' is empty"),
        (lora(), "1 unknown keys"),
    ],
)
def test_what_is_refused_once_it_is_read_is_not_kept(
    web: HostileWeb, tmp_path: Path, body: bytes, said: str
) -> None:
    """Also where a request has it twice; the operator's own file stays."""
    web.answers[KEY] = Reply(body)
    library = LoraLibrary(web.fetcher(tmp_path), ModuleNames.of({}))
    (tmp_path / "own" / "x.safetensors").write_bytes(body)
    for inputs in (LoraInputs(URL), LoraInputs(URL, extra_lora=URL), LoraInputs("x.safetensors")):
        with pytest.raises(InvalidRequestError, match=said):
            asyncio.run(use(library, inputs))
        assert left(tmp_path) == []
    assert (tmp_path / "own" / "x.safetensors").exists()


async def use(library: LoraLibrary, inputs: LoraInputs) -> None:
    async with library.using(inputs):
        pass


def test_what_others_use_stays_until_they_find_it_of_no_use_too(
    web: HostileWeb, tmp_path: Path
) -> None:
    web.answers[KEY] = Reply(NOT_FINITE)
    fetcher = web.fetcher(tmp_path)
    first, second = get(fetcher), get(fetcher)
    first.discard()
    assert second.path.read_bytes() == NOT_FINITE
    second.discard()
    assert left(tmp_path) == []
