"""What the GPU thread asks of a device beside computing: when it is done, copies, and failures."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from dmd2.errors import DeviceMemoryError

# Waits until the device has done all that it was given before, and returns when that was, as
# time.perf_counter has it (on CUDA, when it was waited for).
Mark = Callable[[], float]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def memory_errors(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a method that runs out of the device's memory give back what it took, and say so."""

    @wraps(method)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return method(*args, **kwargs)
        except RuntimeError as error:
            if not is_about_memory(error):
                raise
            said = str(error).partition(". ")[0]
        # Only here has the failed call let go of its tensors.
        give_back_memory()
        raise DeviceMemoryError(
            f"{said}. Ask for a smaller image or fewer at once, or run with DMD2_MEMORY=low"
        )

    return guarded


def give_back_memory() -> None:
    """Let the device have what torch holds of its memory and does not use."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reserved_memory() -> int:
    """Bytes of the device's memory that torch cannot give back; 0 without CUDA."""
    give_back_memory()
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


def memory_use(device: torch.device) -> tuple[int, int] | None:
    """Bytes that torch holds of the device's memory, and all that it has; None without CUDA.

    Asks torch's own books, not the device.
    """
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.memory_reserved(device), total


def is_about_memory(error: Exception) -> bool:
    """Whether the device had no memory left, for torch or for a library that it calls."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # cuBLAS and cuDNN ask for workspaces of their own.
    return any(f"{library}_STATUS_ALLOC_FAILED" in str(error) for library in ("CUBLAS", "CUDNN"))


def mark(device: torch.device) -> Mark:
    """A mark behind all that the device was given so far."""
    if device.type != "cuda":
        now = time.perf_counter()
        return lambda: now
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()

    def wait() -> float:
        event.synchronize()
        return time.perf_counter()

    return wait


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for: from pageable memory CUDA would first synchronise."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that a mark behind it waits for."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def is_broken(device: torch.device) -> bool:
    """Whether the device refuses all further work, as CUDA does after some errors."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return True
    return False
