"""Ends Cog's server when its worker has died, so that a restart policy sees it.

Cog's server survives its worker: it goes on answering 409 and never starts another. A small process
beside both holds one end of a pipe whose other end the worker holds: when the worker is gone, by
whatever way, the pipe ends. A server that is shutting down is left alone: it is gone by itself
within the grace period. The other way round, a worker whose server was killed would finish what
nobody can receive, and keep its GPU memory meanwhile: it is ended as well.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_GRACE_S = 2.0
_POLL_S = 0.05
_LOOK_S = 0.5


@contextmanager
def watching() -> Iterator[None]:
    """Have the server watched from here on, as long as the body of `with` does not fail.

    Where setup fails the worker may end, and the server stays, to say why. Outside a worker of
    Cog's server this does nothing.
    """
    watchdog = _start(os.getppid()) if is_cog_worker() else None
    try:
        yield
    except BaseException:
        if watchdog is not None:
            watchdog.kill()
            watchdog.wait()
        raise


def is_cog_worker() -> bool:
    """Whether this process was started by Cog's server, which is its parent then."""
    return "coglet.server._run_worker" in " ".join(sys.orig_argv)


def _start(server_pid: int) -> subprocess.Popen[bytes]:
    """Let the process server_pid end soon after this one, and this one soon after it."""
    reading, _writing = os.pipe()  # the writing end is closed by this process's end, and no sooner
    # A session of its own, so that a signal to the server's group does not end it first.
    watchdog = subprocess.Popen(
        [sys.executable, "-S", "-E", __file__, str(server_pid), str(os.getpid())],
        stdin=reading,
        start_new_session=True,
    )
    os.close(reading)
    return watchdog


def main() -> None:
    """Wait until the worker or the server is gone, and have the other go too."""
    server_pid, worker_pid = int(sys.argv[1]), int(sys.argv[2])
    server_started, worker_started = _start_time(server_pid), _start_time(worker_pid)
    while _start_time(server_pid) == server_started:
        if select.select([sys.stdin], [], [], _LOOK_S)[0]:  # the pipe has ended
            _end(server_pid, server_started, "the worker has died: ending the server\n")
            return
    _end(worker_pid, worker_started, "the server has died: ending the worker\n")


def _end(pid: int, started: str | None, why: str) -> None:
    """Kill a process that is still there after the grace period."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline:
        if _start_time(pid) != started:
            return
        time.sleep(_POLL_S)
    # This process's own standard error may have ended in the worker.
    with suppress(OSError), Path(f"/proc/{pid}/fd/2").open("a") as log:
        log.write(why)
    os.kill(pid, signal.SIGKILL)


def _start_time(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: a later one of its number began later.

    None where it has ended, whether or not its parent has taken notice.
    """
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else others[18]


if __name__ == "__main__":
    main()
