"""Kills and pauses at random moments under load: every client hears, and no image is wrong."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cog_server import CogServer
from server_under_load import SEED, Clients, KnownRequest, known_requests
from servers import start, worker_of

from dmd2.sampling.pipeline import Pipeline
from dmd2.server.janitor import COGLET_PREDICTIONS

NUM_ROUNDS = 50
NUM_CLIENTS = 4
# Until the server is gone after its worker or itself was killed, and the others after it.
DEATH_S, END_S = 5.0, 5.0


@dataclass(frozen=True)
class Incident:
    """What happens to one of a server's processes.

    Attributes:
        victim: "worker" or "server".
        number: the signal; SIGSTOP is followed by SIGCONT.
    """

    victim: str
    number: signal.Signals

    def __str__(self) -> str:
        return f"{self.number.name} of the {self.victim}"


PAUSES = [Incident("worker", signal.SIGSTOP), Incident("server", signal.SIGSTOP)]
DEATHS = [
    Incident("worker", signal.SIGKILL),
    Incident("worker", signal.SIGSEGV),
    Incident("worker", signal.SIGABRT),
    Incident("server", signal.SIGKILL),
]
STOP = Incident("server", signal.SIGTERM)
SHORT = [PAUSES[0], DEATHS[1], DEATHS[3], STOP]


def test_chaos(
    request: pytest.FixtureRequest, model_folder: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    rng = random.Random(SEED)
    known = known_requests(pipeline, tmp_path / "alone", 16)
    incidents = drawn(rng, NUM_ROUNDS) if request.config.getoption("--full") else SHORT
    kinds: Counter[str] = Counter()
    number = 0
    while number < len(incidents):  # a server's life
        with contextlib.ExitStack() as life:
            server = life.enter_context(start(model_folder, DMD2_OUTPUT_DIR=str(tmp_path)))
            assert server.wait_until_set_up(120)["status"] == "READY"
            while number < len(incidents) and server.process.poll() is None:
                kinds += a_round(server, incidents[number], known, rng)
                number += 1
    print(f"chaos, seed {SEED}: {number} rounds, {dict(Counter(map(str, incidents)))}")
    print(f"answers: {dict(kinds)}")


def drawn(rng: random.Random, num_rounds: int) -> list[Incident]:
    """As many of each, in random order."""
    every = [*PAUSES, *DEATHS, STOP]
    incidents = (every * num_rounds)[:num_rounds]
    rng.shuffle(incidents)
    return incidents


def a_round(
    server: CogServer, incident: Incident, known: list[KnownRequest], rng: random.Random
) -> Counter[str]:
    """Load, the incident, and what came of it; the answers by kind."""
    name = f"chaos-{time.time_ns():x}"
    clients = Clients(server.url, known, NUM_CLIENTS, name)
    try:
        time.sleep(rng.uniform(0.2, 2.0))
        if incident in PAUSES:
            outlive_a_pause(server, incident, clients, rng.uniform(0.2, 2.0))
        elif incident == STOP:
            end_as_told(server, clients)
        else:
            die(server, incident)
    finally:
        clients.stop()
    judge(clients, incident)
    return clients.kinds


def outlive_a_pause(
    server: CogServer, incident: Incident, clients: Clients, seconds: float
) -> None:
    """Every client is served on."""
    pid = pid_of(server, incident.victim)
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)
    waiting, deadline = set(clients.asking), time.monotonic() + 30
    while waiting & clients.asking and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not waiting & clients.asking, f"{incident} left clients without an answer"
    clients.stop()
    assert server.health()["status"] == "READY"


def end_as_told(server: CogServer, clients: Clients) -> None:
    """All that was accepted is answered, and that is a success."""
    processes = processes_of(server)
    # Cog's server makes a folder for each prediction that it has accepted.
    accepted = {each for each in set(clients.asking) if (COGLET_PREDICTIONS / each).exists()}
    os.kill(server.process.pid, STOP.number)
    assert server.process.wait(timeout=30) == 0
    clients.stop()
    lost = [a for a, fault in clients.answers if a.prediction_id in accepted and fault]
    assert not lost, f"seed {SEED}: accepted, and lost: {lost}"
    assert_gone(processes)


def die(server: CogServer, incident: Incident) -> None:
    """The server ends too, and says that it failed."""
    processes = processes_of(server)
    os.kill(pid_of(server, incident.victim), incident.number)
    assert server.process.wait(timeout=DEATH_S) != 0, f"{incident}: {server.process.returncode}"
    assert_gone(processes)


def judge(clients: Clients, incident: Incident) -> None:
    """Right images, or word that there are none, and that only where something has ended."""
    kinds = {"closed", "failed"} if incident in DEATHS else {"closed"} if incident == STOP else ()
    for answer, fault in clients.answers:
        assert fault is None or answer.kind in kinds, f"{incident}: {fault}"


def pid_of(server: CogServer, victim: str) -> int:
    return worker_of(server) if victim == "worker" else server.process.pid


def processes_of(server: CogServer) -> set[int]:
    """The worker and the watchdog, which must not outlive the server."""
    worker = worker_of(server)
    watched = [str(server.process.pid), str(worker)]
    watchdogs = {
        pid
        for pid, args in command_lines()
        if args[-2:] == watched and "dmd2/server/watchdog.py" in str(args)
    }
    assert len(watchdogs) == 1, "a server has one watchdog"
    return {worker, *watchdogs}


def command_lines() -> Iterator[tuple[int, list[str]]]:
    """The process id and the arguments of every process that lives; a zombie has none."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            args = (process / "cmdline").read_text().split("\0")[:-1]
            if args:
                yield int(process.name), args


def assert_gone(processes: set[int]) -> None:
    deadline = time.monotonic() + END_S
    while left := {pid: args for pid, args in command_lines() if pid in processes}:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)
