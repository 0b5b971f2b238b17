"""The data set's pictures and captions, made by all cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from training.demo.drawing import draw
from training.demo.drawings import Source
from training.demo.scenes import sample

Result = TypeVar("Result")
_SHARE = 64  # pictures that a process is given at once; fewer in all are drawn where they are asked


@dataclass(frozen=True)
class World:
    """A data set: the scenes that a seed stands for, in drawings of some source."""

    seed: int
    source: Source


class Painters:
    """Processes that draw scenes of a data set; made by `painters`."""

    def __init__(self, pool: ProcessPoolExecutor, world: World) -> None:
        self._pool, self._world = pool, world

    def pictures(self, indices: range) -> NDArray[np.uint8]:
        """uint8 [N, 128, 128, 3], in the order of indices."""
        return np.concatenate(self._share(_pictures, indices))

    def captions(self, indices: range, telling: int) -> list[str]:
        """What a telling says of the scenes, in the order of indices."""
        return list(chain.from_iterable(self._share(partial(_captions, telling=telling), indices)))

    def _share(self, work: Callable[[World, range], Result], indices: range) -> list[Result]:
        shares = [indices[first : first + _SHARE] for first in range(0, len(indices), _SHARE)]
        if len(shares) == 1:
            return [work(self._world, indices)]
        return list(self._pool.map(work, [self._world] * len(shares), shares))


@contextmanager
def painters(world: World) -> Iterator[Painters]:
    """Painters of a data set, one for each core; its drawings are fetched first.

    Raises:
        DrawingsError: the drawings could not be fetched.
    """
    world.source.drawings()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A fork would inherit torch's threads, and with them locks that nobody opens.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=spawn) as pool:
        yield Painters(pool, world)


def _pictures(world: World, indices: range) -> NDArray[np.uint8]:
    drawings = world.source.drawings()
    return np.stack([draw(sample(world.seed, index).scene, drawings) for index in indices])


def _captions(world: World, indices: range, telling: int) -> list[str]:
    return [sample(world.seed, index, telling=telling).caption for index in indices]
