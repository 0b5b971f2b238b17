"""What stands before the tensors of a safetensors file of unknown origin; no torch."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from safetensors import SafetensorError, deserialize

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
# As much of a file as tells what it is.
BEGINNING_BYTES = 512
# What safetensors says of a good header alone.
_TENSORS_TO_COME = "file not fully covered"
# A header may take ten times its size as Python's objects: of files on their way, one at a time.
_LOOKING = threading.Lock()


def checked(chunks: Iterable[bytes], num_bytes: int | None) -> Iterator[bytes]:
    """The chunks of a LoRA on its way, each once nothing that came so far speaks against it.

    The header is held in memory until it is whole, and looked at then.

    Args:
        chunks: the first has BEGINNING_BYTES, unless the whole file has fewer.
        num_bytes: of the whole file; None where nobody declares it.

    Raises:
        LoraError: by its header read_tensors would refuse it, or it is not as long as that says.
    """
    head, received, whole = b"", 0, None
    for chunk in chunks:
        received += len(chunk)
        if whole is None:
            head += chunk
            end = _header_end(head[:BEGINNING_BYTES], num_bytes)
            if len(head) >= end:
                whole, head = _num_bytes(head[:end]), b""
        if whole is not None and (num_bytes not in (None, whole) or received > whole):
            raise LoraError("it is not as long as its header says", _FETCH_AGAIN)
        yield chunk
    if received != whole:
        raise LoraError("it is cut short" if received else "it is empty", _FETCH_AGAIN)


def read_header(file: BinaryIO) -> dict[str, Any]:
    """What stands before a safetensors file's tensors: of each its facts, and "__metadata__".

    Args:
        file: at its beginning.

    Raises:
        LoraError: it is not a safetensors file, is cut short or malformed, or has a header of more
            than MAX_HEADER_BYTES.
        OSError: it cannot be read.
    """
    return _parsed(_text_of(file))


def read_lora_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, str]]:
    """Of each tensor of a LoRA its facts, and the metadata.

    Args:
        file: at its beginning.

    Raises:
        LoraError: read_header refuses it, or it has no tensors or more than MAX_TENSORS, or one of
            another dtype than float16, bfloat16 and float32.
        OSError: it cannot be read.
    """
    return _parsed_lora(_text_of(file))


def malformed(error: SafetensorError) -> LoraError:
    """The same, as it is said of a file."""
    return LoraError(f"it is malformed: {shown(str(error))}", _FETCH_AGAIN)


def shown(text: str) -> str:
    """A name from a file as a message may show it: short, and printable in any encoding."""
    return ascii(text if len(text) <= 100 else f"{text[:97]}...")


def _text_of(file: BinaryIO) -> bytes:
    end = _header_end(file.read(BEGINNING_BYTES), os.fstat(file.fileno()).st_size)
    file.seek(8)
    return file.read(end - 8)


def _header_end(beginning: bytes, num_bytes: int | None) -> int:
    """Where the header of a file of so many bytes ends, by its first BEGINNING_BYTES."""
    length = int.from_bytes(beginning[:8], "little")
    if beginning[8:9] != b"{" or length > max(num_bytes or 0, MAX_HEADER_BYTES):
        raise LoraError(f"it is {_kind_of(beginning)}", _TAKE_SAFETENSORS)
    if length > MAX_HEADER_BYTES:
        raise LoraError(
            f"its header has {length} bytes, and may have {MAX_HEADER_BYTES}",
            "Take a file without training data in its header",
        )
    if num_bytes is not None and length > num_bytes - 8:
        raise LoraError("it is cut short", _FETCH_AGAIN)
    return 8 + length


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise LoraError("its header is malformed", _FETCH_AGAIN) from error
    if not isinstance(header.get("__metadata__", {}), Mapping):
        raise LoraError("its header is malformed", _FETCH_AGAIN)
    return dict(header)


def _num_bytes(head: bytes) -> int:
    """Of a whole LoRA, by all that stands before its tensors."""
    with _LOOKING:
        try:
            # A byte more, or it would make an object of each tensor where all of them are empty.
            deserialize(head + b"\0")  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            if _TENSORS_TO_COME not in str(error):
                raise malformed(error) from error
        tensors, _ = _parsed_lora(head[8:])
        return len(head) + max(int(facts["data_offsets"][1]) for facts in tensors.values())


def _parsed_lora(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    header = _parsed(text)
    metadata = header.pop("__metadata__", {})
    if not header or len(header) > MAX_TENSORS:
        raise LoraError(
            f"it holds {len(header)} tensors, and a LoRA has from 1 to {MAX_TENSORS}",
            "Take the LoRA's own file",
        )
    dtypes = {_dtype_of(facts) for facts in header.values()}
    if dtypes - _DTYPES:
        raise LoraError(
            f"it holds tensors of dtype {', '.join(sorted(map(ascii, dtypes - _DTYPES)))[:100]}",
            "Take a file in F16, BF16 or F32, or convert it to F16",
        )
    return header, metadata


def _dtype_of(facts: Any) -> str | None:
    dtype = facts.get("dtype") if isinstance(facts, dict) else None
    return dtype if isinstance(dtype, str) else None


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
