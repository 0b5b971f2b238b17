"""Files of unknown origin: what is not a safetensors file of tensors is refused, and why."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dmd2.errors import InvalidRequestError, LoraError
from dmd2.loras.header import MAX_HEADER_BYTES, MAX_TENSORS
from dmd2.loras.lora_file import read_tensors

GOOD = save({"a": torch.ones(2), "b": torch.zeros(2, 2, dtype=torch.float16)}, {"who": "me"})
ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def file_of(header: str | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with a header of any text."""
    text = header if isinstance(header, bytes) else header.encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("lora.safetensors", GOOD)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("lora.safetensors")
        entry.size = len(GOOD)
        archive.addfile(entry, io.BytesIO(GOOD))
    return file.getvalue()


def torch_saved(**how: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file, **how)
    return file.getvalue()


def with_dtype(dtype: torch.dtype) -> bytes:
    return save({"a": torch.ones(2).to(dtype)})


# What the error says, and the file.
HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty": ("it is empty", lambda: b""),
    "short": ("not a safetensors file", lambda: b"\x01"),
    "text": ("not a safetensors file", lambda: b"hello, world" * 100),
    "zip": ("a zip archive or a pickle", zipped),
    "torch": ("a zip archive or a pickle", torch_saved),
    "old-torch": ("a pickle", lambda: torch_saved(_use_new_zipfile_serialization=False)),
    "pickle": ("a pickle", lambda: pickle.dumps({"a": 1})),
    "tar": ("a tar archive", tarred),
    "gzip": ("a gzip archive", lambda: b"\x1f\x8b\x08" + bytes(100)),
    "web-page": ("a web page", lambda: b"<!doctype html><html>"),
    "json": ("JSON", lambda: b'{"error": "not found"}'),
    "pointer": ("a pointer of Git LFS", lambda: b"version https://git-lfs.github.com/spec/v1\n"),
    "cut-header": ("it is cut short", lambda: GOOD[:50]),
    "cut-body": ("it is malformed", lambda: GOOD[:-1]),
    "long-body": ("it is malformed", lambda: GOOD + b"\0"),
    "lying-length": ("not a safetensors file", lambda: file_of("{}", length=2**63)),
    "huge-header": (
        f"header has {MAX_HEADER_BYTES + 1} bytes",
        lambda: file_of("{" + " " * MAX_HEADER_BYTES, length=MAX_HEADER_BYTES + 1),
    ),
    "not-json": ("header is malformed", lambda: file_of('{"a"')),
    "not-utf-8": ("header is malformed", lambda: file_of(b'{"\xff": 1}')),
    "deep": ("header is malformed", lambda: file_of('{"a":' + "[" * 100_000)),
    "number": ("header is malformed", lambda: file_of('{"a":' + "9" * 10_000 + "}")),
    "metadata": ("header is malformed", lambda: file_of('{"__metadata__": [1]}')),
    "metadata-of-numbers": (
        "it is malformed",
        lambda: file_of(f'{{"__metadata__":{{"who":1}},"a":{ENTRY}}}', bytes(4)),
    ),
    "twice": (
        "header is malformed",
        lambda: file_of(f'{{"a":{ENTRY},"a":{ENTRY}}}', bytes(4)),
    ),
    "nested-twice": (
        "header is malformed",
        lambda: file_of('{"a":{"dtype":"F32","dtype":"F32"}}', bytes(4)),
    ),
    "overlap": ("it is malformed", lambda: file_of(f'{{"a":{ENTRY},"b":{ENTRY}}}', bytes(4))),
    "no-shape": ("it is malformed", lambda: file_of('{"a":{"dtype":"F32"}}')),
    "not-an-entry": ("of dtype None", lambda: file_of('{"a":1}')),
    "not-a-dtype": ("of dtype None", lambda: file_of('{"a":{"dtype":[]}}')),
    "no-tensors": ("holds 0 tensors", lambda: file_of('{"__metadata__":{}}')),
    "many-tensors": (
        f"holds {MAX_TENSORS + 1} tensors",
        lambda: file_of(json.dumps({str(n): 1 for n in range(MAX_TENSORS + 1)})),
    ),
    "float64": ("dtype 'F64'", lambda: with_dtype(torch.float64)),
    "float8": ("dtype 'F8_E4M3'", lambda: with_dtype(torch.float8_e4m3fn)),
    "int": ("dtype 'I64'", lambda: with_dtype(torch.int64)),
    "nan": ("'a' is not finite", lambda: save({"a": torch.tensor([1.0, float("nan")])})),
    "inf": ("'a' is not finite", lambda: save({"a": torch.tensor(float("-inf")).half()})),
    "no-elements": ("'a' is empty", lambda: save({"a": torch.ones(0, 4)})),
}


@pytest.mark.parametrize("file", HOSTILE)
def test_a_file_that_is_not_one_is_refused(tmp_path: Path, file: str) -> None:
    message, make = HOSTILE[file]
    path = tmp_path / "lora.safetensors"
    path.write_bytes(make())
    with pytest.raises(LoraError, match=message):
        read_tensors(path)


def test_a_good_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(GOOD)
    tensors, metadata = read_tensors(path)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()} == {
        "a": (torch.float32, (2,)),
        "b": (torch.float16, (2, 2)),
    }
    assert metadata == {"who": "me"}


def test_what_was_read_stays_when_the_file_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(GOOD)
    tensors, _ = read_tensors(path)
    with path.open("r+b") as file:
        file.write(bytes(len(GOOD)))
    assert tensors["a"].tolist() == [1.0, 1.0]


def test_what_was_hashed_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(GOOD)
    sha256 = hashlib.sha256(GOOD).hexdigest()
    assert read_tensors(path, sha256)[0]["a"].tolist() == [1.0, 1.0]
    path.write_bytes(GOOD[:-1] + b"x")
    with pytest.raises(LoraError, match=r"changed while it was read\. Ask again"):
        read_tensors(path, sha256)


def test_a_pickle_whose_first_bytes_could_be_a_length_is_still_a_safetensors_file(
    tmp_path: Path,
) -> None:
    """A header of 0x280 bytes begins as a pickle of protocol 2 does."""
    path = tmp_path / "lora.safetensors"
    header = json.dumps({"__metadata__": {"pad": ""}, "a": json.loads(ENTRY)})
    header = header.replace('""', '"' + "x" * (0x280 - len(header)) + '"')
    path.write_bytes(file_of(header, bytes(4)))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_tensors(path)[0]["a"].tolist() == [0.0]


def test_it_becomes_an_error_of_the_input_that_named_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"")
    with pytest.raises(LoraError) as caught:
        read_tensors(path)
    error = caught.value.of_field("extra_lora", "cats.safetensors")
    assert isinstance(error, InvalidRequestError)
    assert str(error) == (
        "extra_lora: 'cats.safetensors' is not allowed: it is empty. "
        "Take the .safetensors file; nothing else is read."
    )
