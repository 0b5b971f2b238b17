"""How scripts/serve-many ends where the gateway dies: by stand-ins for Serve, and in earnest."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from many import RECOVERY_S, running, wait_for

pytestmark = pytest.mark.scale
ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402
from ray.serve.exceptions import (  # noqa: E402
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)

from deploy.gateway.engines.ray_engines import APPLICATION  # noqa: E402
from deploy.gateway.many import ray_serve  # noqa: E402
from deploy.gateway.many.gateway_watch import DEPLOYMENT, GatewayWatch  # noqa: E402
from dmd2.errors import DMD2Error  # noqa: E402

DEATHS = [
    ray.exceptions.ActorDiedError(),
    ray.exceptions.ActorUnavailableError("gone", None),
    ray.exceptions.NodeDiedError("gone"),
    ray.exceptions.OwnerDiedError("0" * 56, None, ""),
    ray.exceptions.WorkerCrashedError(),
    ray.exceptions.TaskCancelledError(),
    DeploymentUnavailableError(None),
    ReplicaUnavailableError("gone"),
    RequestCancelledError("a"),
]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    for pause in ("_LOOK_S", "_LATER_LOOK_S"):
        monkeypatch.setattr(ray_serve, pause, 0.001)
    monkeypatch.setattr(ray_serve, "check_processes", lambda: None)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have Serve's controller say these of the gateway, one after the other, the last for ever."""

    def say(*words: Any) -> None:
        left = list(words)

        def status() -> Any:
            said = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(said, Exception):
                raise said
            gateway = SimpleNamespace(
                status="HEALTHY" if said is None else "UNHEALTHY",
                status_trigger="UNSPECIFIED" if said is None else "REPLICA_STARTUP_FAILED",
                message=said,
            )
            application = SimpleNamespace(status="RUNNING", deployments={DEPLOYMENT: gateway})
            return SimpleNamespace(applications={APPLICATION: application})

        monkeypatch.setattr(serve, "status", status)

    return say


class Response:
    """What becomes of a call: nothing yet, an error, or a result."""

    def __init__(self, *results: Any) -> None:
        self._left = list(results)

    def result(self, timeout_s: float) -> Any:
        found = self._left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def drains(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Have each gateway that is asked to drain, and each way to it, do one of these."""

    def drain(*gateways: Any) -> list[Any]:
        left = list(gateways)

        def handle(_: str) -> Any:
            gateway = left.pop(0)
            if isinstance(gateway, Exception):
                raise gateway
            return SimpleNamespace(drain=SimpleNamespace(remote=lambda: gateway))

        monkeypatch.setattr(serve, "get_app_handle", handle)
        return left

    return drain


def opened() -> GatewayWatch:
    watch = GatewayWatch()
    watch.is_open = True
    return watch


@pytest.mark.parametrize("death", DEATHS, ids=lambda error: type(error).__name__)
def test_a_drain_goes_on_with_the_gateways_successor(
    death: Exception, says: Any, drains: Any
) -> None:
    says(None)
    left = drains(Response(TimeoutError(), death), death, Response(TimeoutError(), None))
    ray_serve._drain(opened())
    assert left == []


def test_a_drain_ends_where_there_is_no_successor(says: Any, drains: Any) -> None:
    says(None, DEATHS[0], "the port is taken")
    drains(Response(*[TimeoutError()] * 9))
    with pytest.raises(DMD2Error, match="cannot be started again: the port is taken"):
        ray_serve._drain(opened())


def test_what_the_gateway_itself_says_of_a_drain_is_final(says: Any, drains: Any) -> None:
    says(None)
    drains(Response(ray.exceptions.RayTaskError("drain", "a traceback", ValueError("of ours"))))
    with pytest.raises(ray.exceptions.RayTaskError):
        ray_serve._drain(opened())


def test_a_gateway_that_cannot_come_back_ends_the_wait(says: Any) -> None:
    says(None, DEATHS[0], None, "the port is taken")
    told = threading.Event()
    bound = threading.Timer(5, told.set)
    bound.start()
    with pytest.raises(DMD2Error, match="cannot be started again: the port is taken"):
        ray_serve._wait(told, GatewayWatch())
    bound.cancel()


def test_who_waits_returns_when_told(says: Any) -> None:
    told, watch = threading.Event(), GatewayWatch()
    says(None)
    threading.Timer(0.1, told.set).start()
    ray_serve._wait(told, watch)
    assert watch.is_open


def test_serve_many_ends_where_the_gateways_port_is_taken(
    model_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("with --full; the others here have stand-ins")
    with running(model_folder, tmp_path, "1") as many:
        many.wait_until_ready(1)
        wait_for(lambda: "all engines are ready" in many.log(), RECOVERY_S, "the whole")
        port = int(many.url.rpartition(":")[2])
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            os.kill(many.gateway(), signal.SIGKILL)
            wait_for(lambda: is_bound(thief, port), RECOVERY_S, "the port")
            assert many.process.wait(RECOVERY_S) == 1
        said = many.log().rpartition("dmd2-cog: ")[2]
        assert said.startswith("the gateway ended, and cannot be started again: ")
        assert f"port {port} of 127.0.0.1 cannot be listened on" in said


def is_bound(thief: socket.socket, port: int) -> bool:
    try:
        thief.bind(("127.0.0.1", port))
    except OSError:
        return False
    thief.listen()
    return True
