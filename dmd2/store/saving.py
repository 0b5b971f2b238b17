"""Weights to files, readable for whom the umask lets read them."""

from __future__ import annotations

import errno
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file of tensors, which need not be contiguous.

    Raises:
        OSError: it could not be written; with ENOSPC where the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {key: tensor.contiguous() for key, tensor in weights.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # not an OSError, not even where the disk is full
        full = f"(os error {errno.ENOSPC})" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
    open_to_others(path)


def open_to_others(path: Path) -> None:
    """Give a file the mode that a new file gets, as the umask says.

    safetensors writes through a temporary file, whose mode of 0600 stays with it: nobody but its
    owner could load it.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        probe = Path(folder) / "probe"
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
