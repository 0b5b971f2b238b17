"""A gateway before many engines, from start to end: what scripts/serve-many does from two on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deploy.gateway.fleet import Fleet
from deploy.gateway.ray_cluster import RayEndedError, check_processes, ray_at, ray_of_its_own
from deploy.gateway.serving import listening
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.work import Engines
from dmd2.errors import DMD2Error
from dmd2.settings import Settings

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from deploy.gateway.ray_engines import Host

_LOOK_S = 0.5


def engine_host(settings: Settings) -> Host:
    """Load the model. Only the process that calls this imports torch."""
    from deploy.gateway.engine_host import EngineHost

    return EngineHost(settings)


@dataclass(frozen=True)
class Site:
    """What is served, and where.

    Attributes:
        settings: of each engine.
        gateway: the gateway's.
        open_host: loads the model in an engine's process: `engine_host`, but for tests.
        make_app: the gateway's ASGI app.
        host, port: where the gateway listens.
    """

    settings: Settings
    gateway: GatewaySettings
    open_host: Callable[[Settings], Host]
    make_app: Callable[[Engines, GatewaySettings], Starlette]
    host: str
    port: int


def serve(fleet: Fleet, site: Site, ray_address: str | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then answer all that was accepted; a second signal ends it.

    Call it on the main thread, before anything imports ray.

    Args:
        fleet: how many engines.
        site: of what, and where.
        ray_address: of a cluster that is there; None starts Ray on this machine.

    Raises:
        DMD2Error: the engines or the gateway cannot be started, the port is not free, or Ray ended.
    """
    # Now rather than when the engines are loaded.
    listening(site.host, site.port, site.gateway).close()
    settings = site.settings
    if settings.metrics_port is not None:
        print("dmd2-cog: engines of a gateway open no DMD2_METRICS_PORT", file=sys.stderr)
        site = replace(site, settings=replace(settings, metrics_port=None))
    wants_gpus = {"cpu": False, "cuda": True}.get(settings.device)
    ray = (
        ray_of_its_own(fleet, wants_gpus=wants_gpus)
        if ray_address is None
        else ray_at(ray_address, fleet, wants_gpus=wants_gpus)
    )
    with ray as whole, _told_to_end() as told, ExitStack() as end:
        end.callback(_take_down, is_own=ray_address is None)
        try:
            _deploy(whole, site)
            if _wait(told):
                _drain()
        except RayEndedError:
            end.pop_all()  # nothing is left to take down
            raise


@contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    """Set by the first signal; the second does what it does without this."""
    told = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def tell(*_: Any) -> None:
        told.set()
        for number in numbers:
            signal.signal(number, before[number])

    for number in numbers:
        signal.signal(number, tell)
    try:
        yield told
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def _deploy(fleet: Fleet, site: Site) -> None:
    from ray import serve

    from deploy.gateway.ray_engines import APPLICATION, LOGGING, engines_of
    from deploy.gateway.ray_gateway import gateway_of

    serve.start(proxy_location="Disabled", logging_config=LOGGING)
    engines = engines_of(fleet, site.settings, site.open_host)
    whole = gateway_of(engines, site.make_app, site.gateway, site.host, site.port)
    target = serve.RunTarget(whole, name=APPLICATION, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)


def _wait(told: threading.Event) -> bool:
    """Return once told to end; whether the gateway may have accepted anything by then.

    Raises:
        DMD2Error: what was deployed cannot be started.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from deploy.gateway.ray_engines import APPLICATION
    from deploy.gateway.ray_gateway import DEPLOYMENT

    is_open = is_whole = False
    while not told.wait(_LOOK_S):
        check_processes()
        if is_whole:
            continue
        with suppress(RayError, RayServeException):  # the controller is being started again
            found = serve.status().applications[APPLICATION]
            is_open = is_open or found.deployments[DEPLOYMENT].status == "HEALTHY"
            is_whole = found.status == "RUNNING"
            if is_whole:
                print("dmd2-cog: all engines are ready", file=sys.stderr, flush=True)
            if found.status == "DEPLOY_FAILED":
                raise DMD2Error(_why(found))
    return is_open


def _why(application: Any) -> str:
    """What each deployment says that failed."""
    said = [each.message for each in application.deployments.values() if each.message]
    return "\n".join(said) or application.message


def _drain() -> None:
    """Have the gateway answer all that it accepted, whoever dies meanwhile."""
    from ray import serve
    from ray.exceptions import RayActorError

    from deploy.gateway.ray_engines import APPLICATION

    gateway = serve.get_app_handle(APPLICATION)
    answer = gateway.drain.remote()
    while True:
        check_processes()
        try:
            answer.result(timeout_s=_LOOK_S)
            return
        except TimeoutError:
            continue
        except RayActorError:  # it died; Serve starts another, which has its journal
            answer = gateway.drain.remote()


def _take_down(*, is_own: bool) -> None:
    """End the application, and with it Serve, unless somebody else's runs there."""
    from ray import serve

    from deploy.gateway.ray_engines import APPLICATION

    if not is_own:
        serve.delete(APPLICATION)
    if is_own or not serve.status().applications:
        serve.shutdown()
