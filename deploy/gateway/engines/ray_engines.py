"""The engines as a Ray Serve deployment, and the gateway's way to all of them."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import (
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)

from deploy.gateway.engines.fleet import Fleet
from deploy.gateway.work import EngineDiedError, Outcome, Work
from dmd2.errors import ModelError
from dmd2.model_card import ModelCard
from dmd2.settings import Settings

log = logging.getLogger(__name__)

APPLICATION, DEPLOYMENT = "dmd2", "Engine"
# A full engine has some 16 batches of the usual 4 before it: with fewer, Serve's router, which
# sleeps while every engine is full, let the batches run dry (measured at 8 and 16: half as many
# images a second).
MAX_ONGOING = 64
# The gateway sends so much for each engine; Serve's router, which knows of an answer a little later
# and evens out two engines only roughly, may send one that many more before it takes it for full.
_SLACK = 16
# For the same reason it sleeps no longer than this; by its own choice, 0.025 to 0.5 s.
_BACK_OFF_S = (0.005, 0.020)
_LOOK_S = 0.5
# An engine whose disk is full keeps work for so long before it sends it back: if it answered at
# once, it would have the least to do, and be given all that another could do.
_HOLD_S = 2.0
# What an engine has said of its disk is taken to be so for this long.
_FULL_S = 10.0
# Of each call it says more than anybody reads.
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
# Serve waits for what is under way before it ends an engine: the engine's own deadlines and this.
_GRACE_S = 60.0
# The engine, its process or its machine is gone, or what it made went with it: whatever Ray calls
# it, another engine can do the work.
_GONE = (
    RayActorError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    WorkerCrashedError,
    TaskCancelledError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)


class Host(Protocol):
    """What does the work in an engine's process."""

    @property
    def card(self) -> ModelCard:
        """The model's."""

    async def run(self, work: Work) -> Outcome:
        """Do it; whoever cancels this ends the work before its next step."""

    def problem(self) -> str | None:
        """Why it takes no work for now, or None. From any thread."""


@dataclass(frozen=True)
class NotNow:
    """What an engine says of work that it has not begun: another one may, or this one later.

    Attributes:
        engine: its process and machine.
        problem: why.
    """

    engine: str
    problem: str


class Engine:
    """One engine, in a process of its own, and on a GPU of its own where there are any.

    Args:
        settings: of the engine.
        open_host: loads the model; what the process does from then on is this host's affair.
    """

    def __init__(self, settings: Settings, open_host: Callable[[Settings], Host]) -> None:
        self._host = open_host(settings)

    async def run(self, work: Work) -> Outcome | NotNow:
        """Have the host do it; Ray cancels this where the gateway asks for that."""
        began = time.monotonic()
        while (problem := await asyncio.to_thread(self._host.problem)) is not None:
            if time.monotonic() - began > _HOLD_S:
                return NotNow(f"process {os.getpid()} of {platform.node()}", problem)
            await asyncio.sleep(_LOOK_S)
        return await self._host.run(work)

    async def card(self) -> ModelCard:
        """The model's."""
        return self._host.card


def engines_of(
    fleet: Fleet, settings: Settings, open_host: Callable[[Settings], Host]
) -> serve.Application:
    """The deployment of a fleet's engines."""
    scaling: dict[str, Any] = {"num_replicas": fleet.min_engines}
    if fleet.max_engines > fleet.min_engines:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=fleet.min_engines,
                max_replicas=fleet.max_engines,
                target_ongoing_requests=MAX_ONGOING / 3,
                upscale_delay_s=fleet.upscale_delay_s,
                downscale_delay_s=fleet.downscale_delay_s,
                look_back_period_s=min(30.0, max(2.0, fleet.upscale_delay_s)),
                metrics_interval_s=1.0,
            )
        }
    deployment = serve.deployment(
        Engine,
        name=DEPLOYMENT,
        ray_actor_options={"num_gpus": fleet.num_gpus, "num_cpus": fleet.num_cpus},
        max_ongoing_requests=MAX_ONGOING + _SLACK,
        max_queued_requests=-1,  # the gateway has the limit
        health_check_period_s=2.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.run_timeout_s + _GRACE_S,
        request_router_config=RequestRouterConfig(
            initial_backoff_s=_BACK_OFF_S[0], max_backoff_s=_BACK_OFF_S[1]
        ),
        logging_config=LOGGING,
        **scaling,
    )
    return deployment.bind(settings, open_host)


class RayEngines:
    """All engines of the application, as the gateway sees them: `work.Engines`.

    Args:
        handle: of the engines' deployment.

    Attributes:
        num_ready: engines that take work, as Serve's controller and they said last.
        capacity: how much work they may have together.
    """

    is_in_process = False

    def __init__(self, handle: Any) -> None:
        self.num_ready = self.capacity = 0
        self._handle = handle
        self._changed = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._failure: str | None = None
        self._full: dict[str, float] = {}

    async def card(self) -> ModelCard:
        """The model's, once an engine is ready.

        Raises:
            ModelError: Serve has given up starting engines.
        """
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        while True:
            while self.num_ready == 0:
                await self.changed()
                if self._failure is not None:
                    raise ModelError(f"no engine could be started: {self._failure}")
            try:
                card: ModelCard = await self._handle.card.remote()
            except _GONE:  # since it was counted
                await asyncio.sleep(_LOOK_S)
            else:
                return card

    async def run(self, work: Work) -> Outcome:
        """Have it done by an engine with room; among two, by the one that has less to do.

        Where no engine's disk has room, this waits until one has.

        Raises:
            EngineDiedError: its engine died, or cannot be reached.
        """
        while not isinstance(said := await self._said(work), Outcome):
            if said.engine not in self._full:
                log.error("unhealthy: %s: %s", said.engine, said.problem)
            self._full[said.engine] = time.monotonic() + _FULL_S
        return said

    async def changed(self) -> None:
        """Return at the next change of num_ready, or of whether engines can be started."""
        await self._changed.wait()

    async def close(self) -> None:
        """Look no more; the engines end with Serve."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])

    async def _said(self, work: Work) -> Outcome | NotNow:
        """What an engine says of it."""
        response = self._handle.run.remote(work)
        try:
            said: Outcome | NotNow = await response
        except asyncio.CancelledError:
            response.cancel()  # the end of this task alone does not reach the engine
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise EngineDiedError("the way to the engine was closed") from None
        except _GONE as error:
            raise EngineDiedError(type(error).__name__) from error
        return said

    async def _look(self) -> None:
        while True:
            try:
                num_running, failure = await asyncio.to_thread(_found)
            except (RayError, RayServeException, TimeoutError) as error:
                # The controller is being started again: its engines work on meanwhile.
                log.warning("Serve's controller does not answer: %s", type(error).__name__)
            else:
                num_ready = max(0, num_running - self._num_full())
                if (num_ready, failure) != (self.num_ready, self._failure):
                    self._settle(num_ready, failure)
            await asyncio.sleep(_LOOK_S)

    def _num_full(self) -> int:
        """How many engines have said of late that they take no work."""
        now = time.monotonic()
        self._full = {engine: until for engine, until in self._full.items() if until > now}
        return len(self._full)

    def _settle(self, num_ready: int, failure: str | None) -> None:
        log.info("%d engines are ready", num_ready)
        self.num_ready, self.capacity = num_ready, num_ready * MAX_ONGOING
        self._failure = failure
        self._changed.set()
        self._changed = asyncio.Event()


def _found() -> tuple[int, str | None]:
    """How many engines run, and why there will be none, both as Serve's controller says."""
    application = serve.status().applications.get(APPLICATION)
    if application is None or DEPLOYMENT not in application.deployments:
        return 0, None
    engines = application.deployments[DEPLOYMENT]
    failure = engines.message if application.status == "DEPLOY_FAILED" else None
    return engines.replica_states.get("RUNNING", 0), failure
