"""Ten thousand predictions and a kill a minute: none lost, the gateway and its journal as small."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import pytest
from many import RECOVERY_S, Many, assert_none_lost, num_retried, running
from soak.server_under_load import SEED, Answer, Clients, KnownRequest, kind_of
from soak.usage import Usage, assert_counts_flat, assert_memory_flat

from deploy.gateway.keeping.journal_file import FILE

pytestmark = pytest.mark.scale
NUM_NOW, NUM_LATER = 7_000, 3_000
CLIENTS_NOW, CLIENTS_LATER = 24, 8
KILL_EVERY_S, SAMPLE_EVERY_S, POLL_S = 60.0, 2.0, 0.1
MAX_GROWTH = 0.05
# Of the journal's outputs, of which the run makes several times as many; a sweep is a minute apart.
MAX_OUTPUT_BYTES, SWEEP_S = 10_000_000, 61.0
# Some minutes' predictions are larger than the mean of all.
MORE_BYTES = 1.3
# Of a prediction whose outputs are gone, and of SQLite's log ahead of the file.
MAX_ROW_BYTES, MAX_AHEAD_BYTES = 1_500, 8_000_000


@dataclass(frozen=True)
class Sample:
    """At one moment: the gateway's process, and what the journal has on the disk."""

    at: float
    num_later: int
    gateway: Usage
    output_bytes: int
    file_bytes: int
    ahead_bytes: int


def test_a_long_run_leaves_nothing_behind(
    request: pytest.FixtureRequest, model_folder: Path, known: list[KnownRequest], tmp_path: Path
) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("with --full: ten minutes or more")
    room = str(MAX_OUTPUT_BYTES)
    with running(model_folder, tmp_path, "2", DMD2_MAX_OUTPUT_BYTES=room) as many:
        many.wait_until_ready(2)
        gateway, began = many.gateway(), time.monotonic()
        now = Clients(many.url, known, CLIENTS_NOW, "now", NUM_NOW, RECOVERY_S)
        later = Clients(many.url, known, CLIENTS_LATER, "later", NUM_LATER, RECOVERY_S, ask_later)
        samples = list(sampled(many, now, later))
        print(f"seed {SEED}: {len(many.notes('ready')) - 2} engines were killed and replaced")
        print(f"{now.kinds + later.kinds} in {time.monotonic() - began:.0f} s")
        print(f"done again: {num_retried(now) + num_retried(later)}")
        print("first", samples[0], "after a third", samples[len(samples) // 3], "last", samples[-1])
        assert many.gateway() == gateway
    for clients, limit in (now, NUM_NOW), (later, NUM_LATER):
        assert_none_lost(clients, limit - clients.kinds["unready"])
        assert num_retried(clients) > 0
    usages = [sample.gateway for sample in samples]
    assert_counts_flat(usages)
    assert_memory_flat(usages, MAX_GROWTH)
    assert_bounded(samples, mean(sum(map(len, each.files)) for each in known))


def ask_later(http: httpx.Client, id: str, inputs: dict[str, Any]) -> Answer:
    """Have it written down and done, and look until it is."""
    began = time.monotonic()
    body = {"id": id, "input": inputs}
    response = http.post("/predictions", json=body, headers={"Prefer": "respond-async"})
    if response.status_code == 202:
        while response.status_code == 202 or kind_of(response) in ("starting", "processing"):
            time.sleep(POLL_S)
            response = http.get(f"/v1/predictions/{id}")
    return Answer(id, kind_of(response), time.monotonic() - began, response.json())


def sampled(many: Many, now: Clients, later: Clients) -> Iterator[Sample]:
    """All of it every so often, and a kill a minute, while there are clients."""
    rng, last_kill = random.Random(SEED), time.monotonic()
    journal = many.folder / "journal"
    gateway = many.gateway()
    while now or later:
        time.sleep(SAMPLE_EVERY_S)
        if time.monotonic() - last_kill > KILL_EVERY_S and (engines := many.engines()):
            for pid in rng.sample(engines, rng.randint(1, len(engines))):
                os.kill(pid, signal.SIGKILL)
            last_kill = time.monotonic()
        yield Sample(
            time.monotonic(),
            len(later.answers),
            Usage.of(gateway),
            sum(map(size_of, (journal / "outputs").iterdir())),
            size_of(journal / FILE),
            size_of(journal / f"{FILE}-wal"),
        )


def size_of(path: Path) -> int:
    """0 where it has just been deleted."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def assert_bounded(samples: list[Sample], bytes_each: float) -> None:
    """Outputs take what they may, and what came since the last sweep; a row takes little.

    Args:
        samples: of the whole run.
        bytes_each: what the outputs of a prediction take on average.
    """
    allowed = []
    for sample in samples:
        before = [s.num_later for s in samples if s.at < sample.at - SWEEP_S]
        unswept = sample.num_later - max(before, default=0) + CLIENTS_LATER
        allowed.append(MAX_OUTPUT_BYTES + unswept * bytes_each * MORE_BYTES)
    most = max(sample.output_bytes for sample in samples)
    print(f"outputs: {most / 1e6:.1f} MB at most, and {max(allowed) / 1e6:.1f} MB were allowed")
    for sample, bytes_allowed in zip(samples, allowed, strict=True):
        assert sample.output_bytes <= bytes_allowed, sample
        assert sample.ahead_bytes <= MAX_AHEAD_BYTES, sample
    assert samples[-1].file_bytes <= NUM_LATER * MAX_ROW_BYTES, samples[-1]
