"""A safetensors file of unknown origin to tensors: looked at before it is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from dmd2.errors import LoraError
from dmd2.loras.header import malformed, read_lora_header, shown


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
        _, metadata = read_lora_header(file)
        file.seek(0)
        content = file.read()
    if sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise LoraError("it was changed while it was read", "Ask again")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise malformed(error) from error
    for key, tensor in sorted(tensors.items()):
        if not tensor.numel() or not tensor.isfinite().all():
            problem = "not finite" if tensor.numel() else "empty"
            raise LoraError(f"its tensor {shown(key)} is {problem}", "Take another file")
    return tensors, metadata
