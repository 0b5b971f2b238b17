"""The ways to call the models faster than they are written, as a table.

A way is never trusted: dmd2/fast/tuning.py measures and judges each on the device it is to run on.
A further one is a row here and the function that builds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dmd2.fast.compiled import compiled_decoder, compiled_unet
from dmd2.fast.decoder import lean_decoder
from dmd2.fast.graphs import graphed_unet
from dmd2.fast.unet import lean_unet

# What the models do for an image: a step is a call of the UNet, a decode one of the VAE.
Part = Literal["step", "decode"]
# How a model is called that is run as diffusers has written it.
PLAIN = "plain"


@dataclass(frozen=True)
class Facts:
    """What decides whether a way suits.

    Attributes:
        device: where the model is.
        dtype: the model's.
        compile: whether DMD2_COMPILE asks for compiled models.
        low_memory: whether speed counts less than the device's memory.
    """

    device: torch.device
    dtype: torch.dtype
    compile: bool = False
    low_memory: bool = False


def _always(facts: Facts) -> str | None:
    return None


def _where_asked_for(facts: Facts) -> str | None:
    return None if facts.compile else "DMD2_COMPILE is 0"


def _where_graphs_are(facts: Facts) -> str | None:
    if facts.device.type != "cuda":
        return "no CUDA"
    return "they keep too much for DMD2_MEMORY=low" if facts.low_memory else None


@dataclass(frozen=True)
class Way:
    """One way to do a part of the work; exact, that is within the rounding of the dtype.

    Attributes:
        name: as the log and the metric ways say it.
        part: what it does.
        build: from the plain model, which stays as it is, what is called in its stead, with the
            same arguments and results. It may raise anything, and is then not used.
        suits: None, or why it is not even built here.
        compiles: whether its first calls compile. It is asked for by name, so it takes as long as
            it takes, and is used wherever it is close enough.
        first_s: about what it takes to be built and called first, on a device that waits for its
            host; 0 where that is about a call of plain.
        keeps_memory: whether it holds memory between its calls, beside weights.
        includes: the name of a way that it does the same as, and faster, wherever it works: where
            this one is used, that is not tried.
    """

    name: str
    part: Part
    build: Callable[[Any], Any]
    suits: Callable[[Facts], str | None] = _always
    compiles: bool = False
    first_s: float = 0.0
    keeps_memory: bool = False
    includes: str | None = None


# The first of several that were asked for is taken; of the others, the fastest.
WAYS = (
    Way("compiled", "step", compiled_unet, _where_asked_for, compiles=True),
    # For each of two sizes a call and a capture, which the host bounds: on an H200 0.25 s to build
    # them and 0.77 for the first call, in a process that took 0.102 for a plain step.
    Way(
        "graph",
        "step",
        graphed_unet,
        _where_graphs_are,
        first_s=1.02,
        keeps_memory=True,
        includes="lean",
    ),
    Way("lean", "step", lean_unet),
    Way("compiled", "decode", compiled_decoder, _where_asked_for, compiles=True),
    Way("lean", "decode", lean_decoder),
)
