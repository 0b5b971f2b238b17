"""Ray under a gateway: an instance of its own on this machine, or a cluster that is there."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from deploy.gateway.engines.fleet import Fleet
from dmd2.errors import DMD2Error
from dmd2.settings import ROOT

_PATHS = (str(ROOT), str(ROOT / "scripts" / "lib"))
# What all of Ray's processes read. Whoever starts a gateway may have set any of them otherwise.
_CHOICES = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # By default whatever else runs on the machine goes before the gateway and its engines.
    "RAY_worker_niceness": "0",
    # By default the number of engines follows what was under way ten seconds ago.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    # An engine that hangs ends nothing; by default Serve waits for that, and keeps its GPU.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
# On Linux Ray takes 127.0.0.1 for this machine's outer address, and then listens on every one; but
# not where it is told that there is no cluster to join, which is what this does.
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Without these nothing works on.
_PROCESSES = ("gcs_server", "raylet")


class RayEndedError(DMD2Error):
    """One of Ray's own processes has ended, and with it all that it had under way."""


@contextmanager
def ray_of_its_own(fleet: Fleet, *, wants_gpus: bool | None) -> Iterator[Fleet]:
    """Ray on this machine, reached from this machine alone, for as long as the body takes.

    Its processes end with this one, however that ends. Call it before anything imports ray.

    Args:
        fleet: that is to run; the machine's cores are shared out among its engines.
        wants_gpus: whether each engine gets a GPU; None for where there are any.

    Yields:
        The fleet, and what each engine has for itself.

    Raises:
        DMD2Error: Ray does not start, or there are fewer GPUs than engines.
    """
    cores = os.cpu_count() or 1
    num_cpus = max(1, cores // fleet.max_engines)
    with _token(os.environ):
        _settle(os.environ, _CHOICES | _ALONE)
        import ray

        try:
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                num_cpus=max(cores, fleet.max_engines),
            )
        except Exception as error:  # which has no class of its own where a process takes too long
            raise DMD2Error(f"Ray could not be started: {error}") from error
        try:
            num_gpus = int(ray.cluster_resources().get("GPU", 0))
            fleet = replace(fleet, num_cpus=num_cpus, num_gpus=_gpus_each(wants_gpus, num_gpus))
            if fleet.num_gpus and fleet.max_engines > num_gpus:
                raise DMD2Error(
                    f"--engines {fleet.max_engines}: each engine takes a GPU, and this machine "
                    f"has {num_gpus}"
                )
            yield fleet
        finally:
            ray.shutdown()


@contextmanager
def ray_at(address: str, fleet: Fleet, *, wants_gpus: bool | None) -> Iterator[Fleet]:
    """A Ray cluster that is there already, which goes on when the body ends.

    Its nodes have this checkout at the same place, the same packages, and the model's weights. It
    wants the cluster's token, as Ray finds it (RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token). More
    engines than there are GPUs wait for nodes. Call it before anything imports ray.

    Args:
        address: of the cluster, HOST:PORT.
        fleet: that is to run.
        wants_gpus: whether each engine gets a GPU; None for where the cluster has any.

    Yields:
        The fleet, and what each engine has for itself.

    Raises:
        DMD2Error: nobody answers there, or the token is not the right one.
    """
    _settle(os.environ, _CHOICES)
    import ray
    from ray.exceptions import RayError

    variables = {name: os.environ[name] for name in (*_CHOICES, "PYTHONPATH")}
    if "OMP_NUM_THREADS" in os.environ:
        variables["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
    try:
        ray.init(address=address, runtime_env={"env_vars": variables})
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise DMD2Error(f"--ray-address {address}: {error}") from error
    try:
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        yield replace(fleet, num_gpus=_gpus_each(wants_gpus, num_gpus))
    finally:
        ray.shutdown()


def check_processes() -> None:
    """See that Ray's own processes, where this one has started them, are still there.

    Those that ended are waited for, which workers take for the sign that they are to end too.

    Raises:
        RayEndedError: one of them is not.
    """
    for child in psutil.Process().children():
        name = child.name()
        if name in _PROCESSES and child.status() == psutil.STATUS_ZOMBIE:
            child.wait()
            raise RayEndedError(f"Ray's {name} has ended: start the gateway again")


def _gpus_each(wants_gpus: bool | None, num_gpus: int) -> int:
    return int(num_gpus > 0 if wants_gpus is None else wants_gpus)


def _settle(environ: MutableMapping[str, str], choices: dict[str, str]) -> None:
    """Set what is not set. What workers import is found through the environment alone."""
    for name, value in choices.items():
        environ.setdefault(name, value)
    paths = environ.get("PYTHONPATH", "").split(os.pathsep)
    environ["PYTHONPATH"] = os.pathsep.join(
        [*(path for path in _PATHS if path not in paths), *filter(None, paths)]
    )


@contextmanager
def _token(environ: MutableMapping[str, str]) -> Iterator[None]:
    """A token for all of Ray's processes, in a file that nobody else can read, unless one is set.

    By default Ray writes one to ~/.ray/auth_token, readable for everybody and for ever.
    """
    if "RAY_AUTH_TOKEN" in environ or "RAY_AUTH_TOKEN_PATH" in environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="dmd2-ray-") as folder:
        path = Path(folder) / "token"
        path.write_text(secrets.token_hex(32))
        environ["RAY_AUTH_TOKEN_PATH"] = str(path)
        try:
            yield
        finally:
            del environ["RAY_AUTH_TOKEN_PATH"]
