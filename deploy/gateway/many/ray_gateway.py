"""The gateway as a Ray Serve deployment: one process with a front door of its own.

Serve's own HTTP proxy is left off: it does not wait for what is under way when it ends, and takes
half a minute to come back when it dies. Serve starts a gateway that died again, with its journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray import serve
from starlette.applications import Starlette

from deploy.gateway.engines.ray_engines import LOGGING, RayEngines
from deploy.gateway.front import serving
from deploy.gateway.many.gateway_watch import DEPLOYMENT
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.work import Engines

# Ray's own resource of the node that a cluster began with: any share of it pins a process there.
_HEAD = {"node:__internal_head__": 0.001}
_LOOK_S = 0.05


class Gateway:
    """The process that answers HTTP. It loads no model.

    Args:
        engines: a handle of their deployment.
        make_app: the gateway's app before some engines.
        settings: of the gateway.
    """

    def __init__(
        self,
        engines: Any,
        make_app: Callable[[Engines, GatewaySettings], Starlette],
        settings: GatewaySettings,
    ) -> None:
        self._app, self._settings = make_app(RayEngines(engines), settings), settings
        self._stop = asyncio.Event()

    async def reconfigure(self, address: dict[str, Any]) -> None:
        """Begin: Serve calls this once, on the event loop that all else runs on.

        Args:
            address: where to listen, its host and port.

        Raises:
            DMD2Error: the port is not free, or another gateway has the journal.
        """
        listener = serving.listening(address["host"], address["port"], self._settings)
        self._serving = asyncio.create_task(serving.serve(self._app, listener, self._stop))
        while not hasattr(self._app.state, "following"):
            await asyncio.wait([self._serving], timeout=_LOOK_S)
            self.check_health()

    def check_health(self) -> None:
        """Serve starts another once this has raised.

        Raises:
            DMD2Error: the gateway ended, and nobody told it to.
            RuntimeError: it ended without saying why.
        """
        if self._serving.done() and not self._stop.is_set():
            self._serving.result()
            raise RuntimeError("the gateway answers no more")

    async def drain(self) -> None:
        """Refuse new predictions, answer all that were accepted, and close the port."""
        self._stop.set()
        await self._serving


def gateway_of(
    engines: serve.Application,
    make_app: Callable[[Engines, GatewaySettings], Starlette],
    settings: GatewaySettings,
    host: str,
    port: int,
) -> serve.Application:
    """The whole application: one gateway before the engines."""
    deployment = serve.deployment(
        Gateway,
        name=DEPLOYMENT,
        num_replicas=1,
        user_config={"host": host, "port": port},
        ray_actor_options={"num_cpus": 0, "resources": _HEAD},
        health_check_period_s=1.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=1.0,  # whoever wants it drained has done so before
        logging_config=LOGGING,
    )
    return deployment.bind(engines, make_app, settings)
