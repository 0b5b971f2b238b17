"""Containers of the image that DMD2_IMAGE names, run as SECURITY.md says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cog_server import CogServer, free_port

from dmd2.settings import ROOT

# An image of 5 GB starts slowly where the disk is cold.
SETUP_S = 300.0
RESTART_S = 30.0
_WORKER = (
    "for p in /proc/[0-9]*; do grep -qs _run_[w]orker $p/cmdline && echo ${p#/proc/}; done; true"
)


def image() -> str:
    """The image under test."""
    return os.environ["DMD2_IMAGE"]


def docker(*arguments: str) -> str:
    """What a command of Docker's prints, standard error too; it must succeed."""
    done = subprocess.run(
        ["docker", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"docker {shlex.join(arguments)}: {done.stdout[-4000:]}"
    return done.stdout


class Container:
    """A running container.

    Attributes:
        name: of the container.
        server: its server, as the host reaches it.
    """

    def __init__(self, name: str, port: int) -> None:
        self.name, self._port = name, port
        self.server = self._new_server()

    def ready(self) -> CogServer:
        """Its server, READY."""
        health = self.server.wait_until_set_up(SETUP_S)
        assert health["status"] == "READY", f"{health}\n{self.log()}"
        return self.server

    def restarted(self) -> CogServer:
        """Its server after Docker has brought it back, READY."""
        deadline = time.monotonic() + RESTART_S
        while self.state()["RestartCount"] == 0:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)
        self.server.process.wait(timeout=RESTART_S)
        self.server = self._new_server()
        return self.ready()

    def stop(self) -> None:
        """As an operator does, who gives it the time that it was started with."""
        docker("stop", self.name)

    def log(self) -> str:
        """Its last lines."""
        return docker("logs", "--tail", "60", self.name)

    def run(self, command: str) -> str:
        """What a shell inside prints, run by the container's user."""
        return docker("exec", self.name, "sh", "-c", command)

    def state(self) -> dict[str, Any]:
        """What Docker knows of it."""
        (state,) = json.loads(docker("inspect", self.name))
        return dict(state)

    def kill_worker(self) -> None:
        (worker,) = self.run(_WORKER).split()
        self.run(f"kill -9 {worker}")

    def _new_server(self) -> CogServer:
        waiting = subprocess.Popen(["docker", "wait", self.name], stdout=subprocess.DEVNULL)
        return CogServer(self._port, waiting)


@contextmanager
def tight(
    model: str,
    *,
    user: str = "1000:1000",
    tmp: str = "size=2g,mode=1777",
    mounts: Sequence[tuple[Path, str]] = (),
    **environment: str,
) -> Iterator[Container]:
    """A container by SECURITY.md's line, but for --gpus all, the port and what is given.

    Args:
        model: DMD2_MODEL.
        user: for --user.
        tmp: the tmpfs at /tmp.
        mounts: folders of this machine, and where they are inside, read-only.
        environment: further variables.
    """
    name, port = f"dmd2-test-{uuid.uuid4().hex[:8]}", free_port()
    command = tight_command()
    where = command.index("--gpus")
    assert command[where : where + 2] == ["--gpus", "all"]
    del command[where : where + 2]
    replace(command, "--user", "1000:1000", user)
    replace(command, "--tmpfs", "/tmp:size=2g,mode=1777", f"/tmp:{tmp}")
    replace(command, "-p", "127.0.0.1:5000:5000", f"127.0.0.1:{port}:5000")
    assert command.pop() == "dmd2-cog"
    # One thread, since two containers at once, with a thread for each core, would be very slow.
    environment = {"DMD2_MODEL": model, "OMP_NUM_THREADS": "1", **environment}
    command += ["-d", "--name", name]
    command += [f"-e={key}={value}" for key, value in environment.items()]
    command += [f"-v={folder}:{inside}:ro" for folder, inside in mounts]
    try:
        docker(*command[1:], image())
        container = Container(name, port)
        yield container
    finally:
        docker("rm", "-f", name)
    container.server.process.wait(timeout=60)


def tight_command() -> list[str]:
    """The words of SECURITY.md's line."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^docker run .*?(?=^```)", text, re.M | re.S)
    return shlex.split(line.replace("\\\n", " "))


def replace(command: list[str], flag: str, said: str, value: str) -> None:
    """Give a flag that is there once another value."""
    (where,) = [i for i, word in enumerate(command) if word == flag]
    assert command[where + 1] == said
    command[where + 1] = value
