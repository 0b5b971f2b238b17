"""Whether a gateway has engines to give work to, and what it says of that."""

from __future__ import annotations

import asyncio
import platform
from datetime import UTC, datetime
from typing import Any

from deploy.gateway.life.predictions import Predictions
from deploy.gateway.work import Engines
from dmd2 import __version__
from dmd2.model_card import ModelCard

# An engine that died is replaced within this, unless something is wrong.
PATIENCE_S = 30.0


class Readiness:
    """Follows a gateway's engines.

    Attributes:
        card: of the model; None until an engine is ready.
    """

    def __init__(self, engines: Engines, predictions: Predictions) -> None:
        self.card: ModelCard | None = None
        self._engines, self._predictions = engines, predictions
        self._started_at, self._ready_at = _now(), ""
        self._lonely_since: float | None = None

    async def follow(self) -> None:
        """Wait for an engine, and from then on notice when there is none. Never returns.

        Raises:
            ModelError: no engine can be opened.
        """
        self.card = await self._engines.card()
        self._ready_at = _now()
        while True:
            loop = asyncio.get_running_loop()
            if self._engines.num_ready > 0:
                self._lonely_since = None
            elif self._lonely_since is None:
                self._lonely_since = loop.time()
            await self._engines.changed()

    @property
    def status(self) -> str:
        """In Cog's words: STARTING, READY, BUSY (the queue is full) or UNHEALTHY (no engine)."""
        if self.card is None:
            return "STARTING"
        since = self._lonely_since
        if since is not None and asyncio.get_running_loop().time() - since >= PATIENCE_S:
            return "UNHEALTHY"
        return "BUSY" if self._predictions.is_full else "READY"

    @property
    def takes_requests(self) -> bool:
        """Whether a request that comes now has a chance; a full queue has one soon."""
        return self.status in ("READY", "BUSY") and not self._predictions.is_draining

    def health(self) -> dict[str, Any]:
        """What GET /health-check says."""
        is_over = self.card is not None
        setup = {
            "started_at": self._started_at,
            **({"completed_at": self._ready_at} if is_over else {}),
            "status": "succeeded" if is_over else "starting",
            "logs": f"serving {self.card.name}\n" if self.card is not None else "",
        }
        version = {"dmd2": __version__, "python": platform.python_version()}
        return {"status": self.status, "setup": setup, "version": version}


def _now() -> str:
    return datetime.now(UTC).isoformat()
