"""Thousands of predictions: none lost, none mixed up, and the server and its disk stay as small."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
from server_under_load import SEED, Clients, bad_requests, known_requests
from servers import start, worker_of
from usage import Usage, assert_counts_flat, assert_memory_flat

from dmd2.sampling.pipeline import Pipeline
from dmd2.server.janitor import COGLET_PREDICTIONS

NUM_PREDICTIONS, NUM_SHORT = 20_000, 200
NUM_CLIENTS = 6
# How long things are kept, which is longer than a request takes even where much else is going on,
# and how soon after that they are gone.
KEEP_S, KEEP_SHORT_S = 20, 8
SWEEP_EVERY_S, SWEEP_S = 0.5, 3.0
MAX_GROWTH = 0.03

# Sweeps within seconds, and of Cog's own folders only those of this server's predictions.
QUICK_JANITOR = """
import re

import predict
from dmd2.server import janitor, upkeep
from dmd2 import settings

settings.HANDING_OVER_S = -float("inf")  # things may be kept for less than the deadlines
upkeep.ALL_NAMES = re.compile({names!r})
upkeep.Janitor = lambda folders, max_age_s: janitor.Janitor(folders, max_age_s, {every_s})

class Predictor(predict.Predictor):
    pass
"""


@dataclass(frozen=True)
class Sample:
    """At one moment: answers so far, and what the worker, the server and the disk hold."""

    at: float
    num_answers: int
    worker: Usage
    server: Usage
    num_entries: int
    disk_mb: float


def test_soak(
    request: pytest.FixtureRequest, model_folder: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    full = request.config.getoption("--full")
    keep_s, limit = (KEEP_S, NUM_PREDICTIONS) if full else (KEEP_SHORT_S, NUM_SHORT)
    known, outputs = known_requests(pipeline, tmp_path / "alone", 30), tmp_path / "outputs"
    name = f"soak-{time.time_ns():x}"
    with start(model_folder, **quick_janitor(tmp_path, name, outputs, keep_s)) as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        pids = worker_of(server), server.process.pid
        requests = known * 3 + bad_requests()
        began = time.monotonic()
        clients = Clients(server.url, requests, NUM_CLIENTS, name, limit)
        samples = list(sampled(clients, pids, outputs, name, 2.0 if full else 0.5))
        print(f"soak, seed {SEED}: {dict(clients.kinds)} in {time.monotonic() - began:.0f} s")
        print("first", samples[0], "after a third", samples[len(samples) // 3], "last", samples[-1])
        assert len(clients.answers) == limit
        assert not clients.faults, clients.faults
        for usages in ([s.worker for s in samples], [s.server for s in samples]):
            assert_counts_flat(usages)
            if full:  # too short a run says nothing of the memory
                assert_memory_flat(usages, MAX_GROWTH)
        assert_bounded(samples, keep_s + SWEEP_S)
        assert_empty_in_time(outputs, name, keep_s + SWEEP_S)


def quick_janitor(folder: Path, name: str, outputs: Path, keep_s: float) -> dict[str, str]:
    """The environment of a server that sweeps within seconds."""
    stub = folder / "soak_predict.py"
    stub.write_text(QUICK_JANITOR.format(names=f"{re.escape(name)}-.*", every_s=SWEEP_EVERY_S))
    return {
        "COG_PREDICT_TYPE_STUB": f"{stub}:Predictor",
        "DMD2_KEEP_OUTPUTS_S": str(keep_s),
        "DMD2_OUTPUT_DIR": str(outputs),
    }


def sampled(
    clients: Clients, pids: tuple[int, int], outputs: Path, name: str, every_s: float
) -> Iterator[Sample]:
    """The server as it is every so often, while there are clients."""
    while clients:
        time.sleep(every_s)
        worker, server = map(Usage.of, pids)
        entries = entries_of(outputs, name)
        now, num_answers = time.monotonic(), len(clients.answers)
        yield Sample(now, num_answers, worker, server, len(entries), megabytes(entries))


def entries_of(outputs: Path, name: str) -> list[Path]:
    """What the server's predictions have left on the disk."""
    theirs = list(COGLET_PREDICTIONS.glob(f"{name}-*"))
    return theirs + (list(outputs.iterdir()) if outputs.exists() else [])


def megabytes(entries: list[Path]) -> float:
    """What the files in entries hold; the janitor may be deleting them."""
    total = 0
    for folder, _, names in chain.from_iterable(map(os.walk, entries)):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(folder, name).lstat().st_size
    return total / 1e6


def assert_bounded(samples: list[Sample], kept_s: float) -> None:
    """The disk never holds more than what was made within the time that things are kept.

    Two entries for each prediction: the engine's folder and Cog's own.
    """
    for sample in samples:
        before = [s.num_answers for s in samples if s.at < sample.at - kept_s]
        recent = sample.num_answers - max(before, default=0)
        assert sample.num_entries <= 2 * (recent + NUM_CLIENTS), sample


def assert_empty_in_time(outputs: Path, name: str, kept_s: float) -> None:
    """With nobody asking, all that is left is swept."""
    deadline = time.monotonic() + kept_s
    while left := entries_of(outputs, name):
        assert time.monotonic() < deadline, f"{len(left)} entries stay, such as {left[0]}"
        time.sleep(0.2)
