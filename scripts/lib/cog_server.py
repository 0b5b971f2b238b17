"""Cog's own server on this checkout's predict.py, without Docker."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import httpx
from cog_config import container_environment
from cog_schema import write_schema

from dmd2.settings import ROOT

AS_IN_CONTAINER = Path(__file__).resolve().parent / "as_in_container"
_BUSY_WAIT_S = 0.05
# Below where Linux and macOS begin to give ports to connections.
_PORTS = (20_000, 32_000)


def server_environment(overrides: Mapping[str, str]) -> dict[str, str]:
    """The container's variables, then the caller's own, then overrides.

    But for where torch keeps compiled code: outside a container, each user has their own folder.
    Cog's server starts its worker as `python`, so this environment's comes first on PATH.
    """
    environment = container_environment()
    del environment["TORCHINDUCTOR_CACHE_DIR"]
    environment |= {**os.environ, **overrides}
    own = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([own, environment.get("PATH", os.defpath)])
    paths = [str(AS_IN_CONTAINER), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if shutil.which("python", path=own) is None:
        raise FileNotFoundError(f"{own} has no `python`, by which Cog's server starts its worker")
    return environment


def server_command(host: str = "127.0.0.1") -> list[str]:
    """The command that starts the server; PORT in the environment chooses its port."""
    return [sys.executable, "-m", "cog.server.http", "--host", host]


class CogServer:
    """A running server.

    Attributes:
        url: where it answers.
        process: the server's process, which ends when `running` is left.
    """

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = process
        self._client = httpx.Client(base_url=self.url, timeout=None, trust_env=False)

    def health(self) -> dict[str, Any]:
        """The body of /health-check."""
        return dict(self._client.get("/health-check").json())

    def wait_until_set_up(self, timeout_s: float) -> dict[str, Any]:
        """The first health after setup ended, READY or not.

        Raises:
            TimeoutError: setup was still going on.
            RuntimeError: the server ended.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {self.process.returncode}")
            try:
                health = self.health()
            except httpx.TransportError:
                health = {"status": "STARTING"}
            if health["status"] != "STARTING":
                return health
            time.sleep(_BUSY_WAIT_S)
        raise TimeoutError(f"the server was not set up after {timeout_s:g} s")

    def predict(self, inputs: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Run a prediction and wait for it; a full server (409) is asked again shortly.

        Raises:
            RuntimeError: the server's worker is dead.
            httpx.TransportError: the server is gone.
        """
        while True:
            response = self._client.post("/predictions", json={"input": dict(inputs), **more})
            if response.status_code != 409:
                return {"http_status": response.status_code, **response.json()}
            if self.health()["status"] not in ("READY", "BUSY"):
                raise RuntimeError("the server's worker has died: it answers 409 for ever")
            time.sleep(_BUSY_WAIT_S)


@contextmanager
def running(overrides: Mapping[str, str] = {}, log: IO[bytes] | None = None) -> Iterator[CogServer]:
    """A server on a free loopback port, stopped at the end."""
    write_schema(ROOT)
    port = free_port()
    process = subprocess.Popen(
        server_command(),
        cwd=ROOT,
        env=server_environment({**overrides, "PORT": str(port)}),
        stdout=log,
        stderr=subprocess.STDOUT if log else None,
    )
    try:
        yield CogServer(port, process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that was free a moment ago, of those that no outgoing connection is given."""
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
