"""A gateway before many engines, from start to end: what scripts/serve-many does from two on."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deploy.gateway.engines.fleet import Fleet
from deploy.gateway.front.serving import listening
from deploy.gateway.many.gateway_watch import GatewayWatch
from deploy.gateway.many.ray_cluster import RayEndedError, check_processes, ray_at, ray_of_its_own
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.work import Engines
from dmd2.errors import DMD2Error
from dmd2.settings import Settings

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from deploy.gateway.engines.ray_engines import Host

log = logging.getLogger(__name__)

_LOOK_S = 0.5
# Once all is ready. A look costs the controller and this process 10 ms of CPU time together.
_LATER_LOOK_S = 2.0


def engine_host(settings: Settings) -> Host:
    """Load the model. Only the process that calls this imports torch."""
    from deploy.gateway.engines.engine_host import EngineHost

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
        DMD2Error: the engines or the gateway cannot be started, or the gateway not again after its
            death; the port is not free; or Ray ended.
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
            watch = GatewayWatch()
            _wait(told, watch)
            if watch.is_open:
                _drain(watch)
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

    from deploy.gateway.engines.ray_engines import APPLICATION, LOGGING, engines_of
    from deploy.gateway.many.ray_gateway import gateway_of

    serve.start(proxy_location="Disabled", logging_config=LOGGING)
    engines = engines_of(fleet, site.settings, site.open_host)
    whole = gateway_of(engines, site.make_app, site.gateway, site.host, site.port)
    target = serve.RunTarget(whole, name=APPLICATION, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)


def _wait(told: threading.Event, watch: GatewayWatch) -> None:
    """Return once told to end.

    Raises:
        DMD2Error: what was deployed cannot be started, or the gateway cannot be started again.
    """
    is_whole = False
    while not told.wait(_LATER_LOOK_S if is_whole else _LOOK_S):
        application = _look(watch)
        if is_whole or application is None:
            continue
        is_whole = application.status == "RUNNING"
        if is_whole:
            print("dmd2-cog: all engines are ready", file=sys.stderr, flush=True)
        if application.status == "DEPLOY_FAILED":
            raise DMD2Error(_why(application))


def _why(application: Any) -> str:
    """What each deployment says that failed."""
    said = [each.message for each in application.deployments.values() if each.message]
    return "\n".join(said) or application.message


def _look(watch: GatewayWatch) -> Any:
    """See to it that the gateway is there; what Serve's controller says, if it answers.

    Raises:
        DMD2Error: it cannot be started again, or Ray ended.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from deploy.gateway.engines.ray_engines import APPLICATION

    check_processes()
    try:
        application = serve.status().applications.get(APPLICATION)
    except (RayError, RayServeException, TimeoutError):  # the controller is being started again
        return None
    watch.look(application, time.monotonic())
    return application


def _drain(watch: GatewayWatch) -> None:
    """Have the gateway answer all that it accepted, whoever dies meanwhile.

    Raises:
        DMD2Error: it died, and cannot be started again.
    """
    from ray import serve
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    from deploy.gateway.engines.ray_engines import APPLICATION

    answer = None
    while True:
        try:
            if answer is None:
                answer = serve.get_app_handle(APPLICATION).drain.remote()
            answer.result(timeout_s=_LOOK_S)
            return
        except TimeoutError:  # it is at it
            pass
        except RayTaskError:  # its own word
            raise
        except (RayError, RayServeException) as error:
            # It died, whatever Ray calls that. Serve starts another, which has its journal.
            log.warning("the gateway is asked again to end: %s", type(error).__name__)
            answer = None
            time.sleep(_LOOK_S)
        _look(watch)


def _take_down(*, is_own: bool) -> None:
    """End the application, and with it Serve, unless somebody else's runs there."""
    from ray import serve

    from deploy.gateway.engines.ray_engines import APPLICATION

    if not is_own:
        serve.delete(APPLICATION)
    if is_own or not serve.status().applications:
        serve.shutdown()
