"""A gateway on a Ray cluster that was there before: nodes die and come, and it leaves it be."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from many import RECOVERY_S, assert_none_lost, load, num_retried, running, wait_for
from soak.server_under_load import known_requests

from dmd2.sampling.pipeline import Pipeline

pytestmark = pytest.mark.scale


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, and two nodes that have room for an engine each."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("SCALE_NOTES", str(tmp_path / "many" / "notes"))
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def test_nobody_notices_the_death_of_a_node(
    cluster: Any, model_folder: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    known = known_requests(pipeline, tmp_path / "alone", 24)
    address = ["--ray-address", cluster.address]
    with running(model_folder, tmp_path / "many", "2", *address) as many:
        many.wait_until_ready(2)
        with load(many, known, "node") as clients:
            time.sleep(1.0)
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
            wait_for(lambda: len(many.engines()) == 1, RECOVERY_S, "the node's end")
            cluster.add_node(num_cpus=1)
            seconds = wait_for(lambda: len(many.engines()) == 2, RECOVERY_S, "its engine")
        print(f"an engine {seconds:.1f} s after a new node")
        assert_none_lost(clients, 64)
        assert num_retried(clients) > 0, "nothing was under way on the node"
        many.process.send_signal(signal.SIGTERM)
        assert many.process.wait(RECOVERY_S) == 0
        wait_for(lambda: not many.pids("ServeReplica"), 30, "the end of the engines")
    assert cluster.head_node.any_processes_alive(), "it ended a cluster that was not its own"
