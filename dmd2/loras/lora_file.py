"""A safetensors file of unknown origin to tensors: looked at before it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from dmd2.errors import LoraError

MAX_HEADER_BYTES = 16_000_000
MAX_TENSORS = 20_000
_DTYPES = {"F16", "BF16", "F32"}
_TAKE_SAFETENSORS = "Take the .safetensors file; nothing else is read"
_FETCH_AGAIN = "Fetch it again, and compare its sha256 with its source's"
# How other files begin. Their first bytes read as a header's length are far beyond the limit.
_BEGINNINGS = (
    (b"PK", "a zip archive or a pickle that torch.save wrote"),
    (b"\x80", "a pickle"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file that it points to"),
    (b"<", "a web page"),
    (b"{", "JSON"),
)
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257


def read_tensors(
    path: Path, sha256: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, in memory of their own, and its header's metadata.

    Meanwhile it takes twice its size. It is not mapped into memory, since a file that is cut short
    by somebody else would then end the process.

    Args:
        path: of the file.
        sha256: that what is read must have; None for any.

    Raises:
        LoraError: it is not a safetensors file, is cut short or malformed, has no tensors or more
            than MAX_TENSORS, or a header of more than MAX_HEADER_BYTES, or a tensor that is empty,
            not finite or of another dtype than float16, bfloat16 and float32; or it has another
            sha256.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = read_header(file)
        file.seek(0)
        content = file.read()
    if sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise LoraError("it was changed while it was read", "Ask again")
    metadata = header.pop("__metadata__", {})
    if not header or len(header) > MAX_TENSORS:
        raise LoraError(
            f"it holds {len(header)} tensors, and a LoRA has from 1 to {MAX_TENSORS}",
            "Take the LoRA's own file",
        )
    dtypes = {each.get("dtype") if isinstance(each, dict) else None for each in header.values()}
    if dtypes - _DTYPES:
        raise LoraError(
            f"it holds tensors of dtype {', '.join(sorted(map(ascii, dtypes - _DTYPES)))[:100]}",
            "Take a file in F16, BF16 or F32, or convert it to F16",
        )
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise LoraError(f"it is malformed: {shown(str(error))}", _FETCH_AGAIN) from error
    for key, tensor in sorted(tensors.items()):
        if not tensor.numel() or not tensor.isfinite().all():
            problem = "not finite" if tensor.numel() else "empty"
            raise LoraError(f"its tensor {shown(key)} is {problem}", "Take another file")
    return tensors, metadata


def shown(text: str) -> str:
    """A name from a file as a message may show it: short, and printable in any encoding."""
    return ascii(text if len(text) <= 100 else f"{text[:97]}...")


def read_header(file: BinaryIO) -> dict[str, Any]:
    """What stands before a safetensors file's tensors: of each its facts, and "__metadata__".

    Args:
        file: at its beginning.

    Raises:
        LoraError: it is not a safetensors file, is cut short or malformed, or has a header of more
            than MAX_HEADER_BYTES.
        OSError: it cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    beginning = file.read(512)
    length = int.from_bytes(beginning[:8], "little")
    if beginning[8:9] != b"{" or length > max(size, MAX_HEADER_BYTES):
        raise LoraError(f"it is {_kind_of(beginning)}", _TAKE_SAFETENSORS)
    if length > MAX_HEADER_BYTES:
        raise LoraError(
            f"its header has {length} bytes, and may have {MAX_HEADER_BYTES}",
            "Take a file without training data in its header",
        )
    if length > size - 8:
        raise LoraError("it is cut short", _FETCH_AGAIN)
    file.seek(8)
    text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise LoraError("its header is malformed", _FETCH_AGAIN) from error
    if not isinstance(header.get("__metadata__", {}), Mapping):
        raise LoraError("its header is malformed", _FETCH_AGAIN)
    return dict(header)


def _kind_of(beginning: bytes) -> str:
    if not beginning:
        return "empty"
    if beginning[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        return "a tar archive"
    kinds = (kind for begins, kind in _BEGINNINGS if beginning.startswith(begins))
    return next(kinds, "not a safetensors file")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The last of two tensors of one name is what safetensors itself takes."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found
