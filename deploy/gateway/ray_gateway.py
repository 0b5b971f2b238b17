"""The gateway as a Ray Serve deployment: one process with a front door of its own.

Serve's own HTTP proxy is left off: it does not wait for what is under way when it ends, and takes
half a minute to come back when it dies. Serve starts a gateway that died again, with its journal.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from ray import serve

from deploy.gateway.ray_engines import LOGGING, RayEngines
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.work import Engines

DEPLOYMENT = "Gateway"
# A client that keeps its connections may use one again at the moment when it is closed for its age.
KEEP_ALIVE_S = 75
_BACKLOG = 2048
# Ray's own resource of the node that a cluster began with: any share of it pins a process there.
_HEAD = {"node:__internal_head__": 0.001}


class Gateway:
    """The process that answers HTTP. It loads no model.

    Args:
        engines: a handle of their deployment.
        make_app: the ASGI app of engines and settings.
        settings: of the gateway.
    """

    def __init__(
        self,
        engines: Any,
        make_app: Callable[[Engines, GatewaySettings], Any],
        settings: GatewaySettings,
    ) -> None:
        self._app = make_app(RayEngines(engines), settings)

    async def reconfigure(self, address: dict[str, Any]) -> None:
        """Listen: Serve calls this once, on the event loop that all else runs on.

        Args:
            address: its host and port.
        """
        listener = socket.create_server((address["host"], address["port"]), backlog=_BACKLOG)
        config = uvicorn.Config(
            self._app, access_log=False, log_level="warning", timeout_keep_alive=KEEP_ALIVE_S
        )
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:  # until then it may fail: the journal is locked
            await asyncio.wait([self._serving], timeout=0.05)
            self.check_health()

    def check_health(self) -> None:
        """Serve starts another once this has raised.

        Raises:
            RuntimeError: the front door is closed, unless it was told to.
        """
        if self._serving.done() and not self._server.should_exit:
            raise RuntimeError(f"the gateway listens no more: {self._serving.exception()}")

    async def drain(self) -> None:
        """Refuse new predictions, answer all that were accepted, and close the front door."""
        await self._app.state.predictions.drain()
        self._server.should_exit = True
        await asyncio.wait([self._serving])


def gateway_of(
    engines: serve.Application,
    make_app: Callable[[Engines, GatewaySettings], Any],
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
