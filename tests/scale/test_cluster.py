"""A gateway on a Ray cluster that was there before: nodes die and come, and it leaves it be."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from many import (
    RECOVERY_S,
    Many,
    assert_none_lost,
    load,
    num_retried,
    print_cost,
    rounds,
    running,
    wait_for,
)
from soak.server_under_load import KnownRequest

pytestmark = pytest.mark.scale


class Nodes:
    """The cluster of nodes.py.

    Attributes:
        address: of the cluster.
        token: the file of its token.
    """

    def __init__(self, process: subprocess.Popen[str], token: Path) -> None:
        self._process, self.token = process, token
        self.address = self._line()

    def tell(self, what: str) -> None:
        """Have it "add" or "kill" a node."""
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)
        assert self._line() == what

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    @property
    def is_there(self) -> bool:
        return self._process.poll() is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[Nodes]:
    """A head, and two nodes that have room for an engine each."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "SCALE_NOTES": str(folder / "many" / "notes"),
    }
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("nodes.py"))],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        nodes = Nodes(process, token)
        nodes.tell("add")
        nodes.tell("add")
        yield nodes
    finally:
        process.communicate(timeout=60)


@contextmanager
def joined(nodes: Nodes, token: Path, model_folder: Path, folder: Path) -> Iterator[Many]:
    """A gateway that has joined the cluster, or tries to."""
    arguments, variables = ["--ray-address", nodes.address], {"RAY_AUTH_TOKEN_PATH": str(token)}
    with running(model_folder, folder, "2", *arguments, **variables) as many:
        yield many


@pytest.fixture(scope="module", autouse=True)
def intruder(nodes: Nodes, model_folder: Path, folder: Path) -> Iterator[Many]:
    """One with another token, from the first test on: Ray takes half a minute to give up."""
    wrong = folder / "wrong"
    wrong.write_text(secrets.token_hex(32))
    with joined(nodes, wrong, model_folder, folder / "intruder") as many:
        yield many


def test_nobody_notices_the_death_of_a_node(
    nodes: Nodes,
    model_folder: Path,
    known: list[KnownRequest],
    folder: Path,
    request: pytest.FixtureRequest,
) -> None:
    with joined(nodes, nodes.token, model_folder, folder / "many") as many:
        for number in rounds(request):
            many.wait_until_ready(2)
            with load(many, known, f"node-{number}") as clients:
                time.sleep(1.0)
                nodes.tell("kill")
                wait_for(lambda: len(many.engines()) == 1, RECOVERY_S, "the node's end")
                nodes.tell("add")
                seconds = wait_for(lambda: len(many.engines()) == 2, RECOVERY_S, "its engine")
            print_cost("a node, and another in its place", clients, seconds)
            assert_none_lost(clients, 64)
            assert num_retried(clients) > 0, "nothing was under way on the node"
        many.process.send_signal(signal.SIGTERM)
        assert many.process.wait(RECOVERY_S) == 0
        wait_for(lambda: not many.pids("ServeReplica"), 30, "the end of the engines")
    assert nodes.is_there
    nodes.tell("add")  # it goes on


def test_a_cluster_is_not_entered_without_its_token(nodes: Nodes, intruder: Many) -> None:
    assert intruder.process.wait(RECOVERY_S) == 1
    assert f"--ray-address {nodes.address}: " in intruder.log()
    assert "Traceback" not in intruder.log()
