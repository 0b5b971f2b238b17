"""A gateway before many engines under test: its processes, and what it answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cog_server import free_port
from scripted_notes import notes
from soak.server_under_load import Answer, Clients, KnownRequest, http_client, kind_of

from dmd2.settings import ROOT

DEMO = ROOT / "weights" / "demo"
START_S, END_S = 600.0, 120.0
# On two cores a model is loaded in seconds; where others work too, in minutes. What a test says of
# time it measures.
RECOVERY_S = 600.0
MAX_ATTEMPTS = 3


class Many:
    """A running gateway.

    Attributes:
        url: where it answers.
        process: of the command.
        folder: its journal, notes, log and Ray's own files.
    """

    def __init__(self, port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.url, self.process, self.folder = f"http://127.0.0.1:{port}", process, folder
        self.http = http_client(self.url)

    def health(self) -> str:
        """The word of /health-check, "" where nobody answers."""
        try:
            return str(self.http.get("/health-check").json()["status"])
        except httpx.TransportError:
            return ""

    def wait_until_ready(self, num_engines: int, timeout_s: float = START_S) -> None:
        """Until so many engines work, and the gateway says that it is ready.

        Raises:
            TimeoutError: they did not come.
        """
        wait_for(lambda: len(self.engines()) == num_engines, timeout_s, f"{num_engines} engines")
        wait_for(lambda: self.health() == "READY", timeout_s, "the gateway")

    def engines(self) -> list[int]:
        """Of the engines that work, the process ids."""
        if self.process.poll() is not None:
            raise AssertionError(f"it ended with {self.process.returncode}: {self.log()[-4000:]}")
        loaded = [note["pid"] for note in self.notes("ready")]
        return [pid for pid in loaded if pid in self.pids("ServeReplica:dmd2:Engine")]

    def gateway(self) -> int:
        """The process id of the gateway itself."""
        (pid,) = self.pids("ServeReplica:dmd2:Gateway")
        return pid

    def controller(self) -> int:
        """The process id of Serve's controller."""
        (pid,) = self.pids("ServeController")
        return pid

    def notes(self, what: str) -> list[dict[str, Any]]:
        """Those of a kind that the engines have made."""
        return [note for note in notes(self.folder / "notes") if note["what"] == what]

    def ids(self, what: str) -> set[str]:
        """Of the predictions that have a note of a kind, the ids."""
        return {note["id"] for note in self.notes(what)}

    def pids(self, title: str) -> list[int]:
        """Of Ray's processes below the tests, those of a title."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error, IndexError):
                if process.cmdline()[0].startswith(f"ray::{title}"):
                    found.append(process.pid)
        return found

    def log(self) -> str:
        """All that it has printed."""
        return (self.folder / "log").read_text(errors="replace")

    def metric(self, name: str) -> float:
        """A gauge of the gateway, as /metrics has it."""
        response = self.http.get("/metrics")
        lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines())
        return float(lines[f"dmd2_gateway_{name}"])

    def listed(self) -> Iterator[dict[str, Any]]:
        """All that is in the journal, without outputs."""
        page: str | None = "/v1/predictions"
        while page is not None:
            body = self.http.get(page).json()
            yield from body["results"]
            page = body["next"]

    def ended(self, id: str) -> Answer | None:
        """What became of it; None while it is under way."""
        response = self.http.get(f"/v1/predictions/{id}")
        assert response.status_code == 200, response.text
        answer = Answer(id, kind_of(response), 0.0, response.json())
        return None if answer.kind in ("starting", "processing") else answer


@contextmanager
def running(
    model: Path, folder: Path, engines: str, *arguments: str, **environment: str
) -> Iterator[Many]:
    """A gateway, not yet ready; it ends with the body, and nothing of it stays."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    fixed = {
        "DMD2_MODEL": str(model),
        "DMD2_DEVICE": "cpu",
        "DMD2_TUNE": "off",
        "DMD2_MAX_BATCH": "4",
        "DMD2_OUTPUT_DIR": str(folder / "outputs"),
        "DMD2_JOURNAL_DIR": str(folder / "journal"),
        "OMP_NUM_THREADS": "1",
        "PORT": str(port),
        "SCALE_NOTES": str(folder / "notes"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, str(Path(__file__).with_name("scripted.py")), engines, *arguments]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **fixed, **environment}, cwd=ROOT, stdout=log, stderr=log
        )
    try:
        yield Many(port, process, folder)
    finally:
        tree = whole_tree(process.pid)
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
        psutil.wait_procs(tree, timeout=20)
        for each in tree:  # what a test has cut off
            with suppress(psutil.Error):
                each.kill()


def whole_tree(pid: int) -> list[psutil.Process]:
    """A process and all below it; none where it has ended."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    return []


def wait_for(is_so: Callable[[], Any], timeout_s: float, what: str) -> float:
    """How many seconds it took to become so."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(f"{what} did not come in {timeout_s:g} s")
        time.sleep(0.1)
    return time.monotonic() - began


@contextmanager
def load(
    many: Many, known: list[KnownRequest], name: str, num_clients: int = 64
) -> Iterator[Clients]:
    """Clients that each have a request under way; when the body ends, they wait for their last."""
    clients = Clients(many.url, known, num_clients, name, timeout_s=RECOVERY_S)
    try:
        wait_for(lambda: len(clients.asking) >= num_clients * 0.9, 60, "the load")
        yield clients
    finally:
        clients.stop()


def assert_none_lost(clients: Clients, at_least: int) -> None:
    """Every answer came, and is right, after three tries at most.

    While no engine has been there for long, requests are not accepted, and so not lost.
    """
    faults = [fault for answer, fault in clients.answers if fault and answer.kind != "unready"]
    assert not faults, faults[:3]
    assert set(clients.kinds) <= {"succeeded", "unready"}, clients.kinds
    assert clients.kinds["succeeded"] >= at_least
    assert max(map(attempts_of, succeeded(clients))) <= MAX_ATTEMPTS


def rounds(request: pytest.FixtureRequest) -> range:
    """How often something is killed."""
    return range(10 if request.config.getoption("--full") else 1)


def print_cost(what: str, clients: Clients, seconds: float) -> None:
    """Say what a death cost.

    Args:
        what: died.
        clients: that had requests under way.
        seconds: until all that had died worked again.
    """
    slowest = max((answer.seconds for answer in succeeded(clients)), default=0.0)
    print(
        f"{what}: there again after {seconds:.1f} s, {num_retried(clients)} done again, "
        f"the slowest answer after {slowest:.1f} s"
    )


def succeeded(clients: Clients) -> list[Answer]:
    return [answer for answer, _ in clients.answers if answer.kind == "succeeded"]


def num_retried(clients: Clients) -> int:
    return sum(attempts_of(answer) > 1 for answer in succeeded(clients))


def attempts_of(answer: Answer) -> int:
    return int(answer.body["metrics"]["attempts"])
