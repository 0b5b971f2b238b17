"""Milliseconds and memory of what a device does."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import torch

from dmd2.errors import DeviceMemoryError

Prepared = TypeVar("Prepared")
Row = dict[str, Any]


def median_ms(
    device: torch.device,
    prepare: Callable[[], Prepared],
    run: Callable[[Prepared], object],
    *,
    seconds: float = 1.0,
    least: int = 3,
    most: int = 30,
) -> float:
    """The median milliseconds of run on what prepare gives, which is not timed; no warm-up.

    On CUDA between events, so from when the device is free until it has done all of it.

    Args:
        device: that does it.
        prepare: makes the argument of each run.
        run: what is timed.
        seconds: when to stop, once it was run as often as least says.
        least: how often it is run, whatever that takes.
        most: how often it is run, however short that is.
    """
    took: list[float] = []
    while len(took) < least or (len(took) < most and sum(took) < 1000 * seconds):
        argument = prepare()
        took.append(milliseconds(device, lambda argument=argument: run(argument)))
    return round(median(took), 3)


def milliseconds(device: torch.device, run: Callable[[], object]) -> float:
    """Of one run."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def fresh_memory() -> None:
    """Give back what nobody holds, and count the peak from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_reserved_gb() -> float:
    """The most that torch held of the GPU since fresh_memory; 0 on a CPU."""
    return round(torch.cuda.max_memory_reserved() / 1e9, 3) if torch.cuda.is_available() else 0.0


def measured(about: Mapping[str, Any], names: Sequence[str], measure: Callable[[], Row]) -> Row:
    """A row: what it is about, and its figures; out of memory is a row too, which says so.

    Args:
        about: stands first in it.
        names: of the figures, None each where there was no memory for them.
        measure: the figures.
    """
    try:
        return {**about, "error": None, **measure()}
    except (DeviceMemoryError, torch.OutOfMemoryError) as error:
        said = str(error).partition("\n")[0]
    fresh_memory()  # only here has the failed call let go of its tensors
    return {**about, "error": f"out of memory: {said}", **dict.fromkeys(names)}
