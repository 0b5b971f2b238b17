"""What Serve's controller says of the gateway, and when that is the end of it.

Engines may be away for as long as they like: the gateway says so. Of itself nobody else would.
"""

from __future__ import annotations

from typing import Any

from dmd2.errors import DMD2Error

DEPLOYMENT = "Gateway"
# A gateway that died is there again within ten seconds; on a machine that is busy, in a minute.
PATIENCE_S = 120.0


class GatewayWatch:
    """Follows the gateway, look by look.

    Attributes:
        is_open: whether it was ready once, and so may have accepted something.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._away_since: float | None = None

    def look(self, application: Any, now: float) -> None:
        """Take note of what the controller says.

        Args:
            application: its status, as `serve.status` has it; None where there is none.
            now: in seconds, by a clock that never goes back.

        Raises:
            DMD2Error: it was open, and cannot be started again; or it has been away for too long.
        """
        gateway = None if application is None else application.deployments.get(DEPLOYMENT)
        if gateway is not None and gateway.status == "HEALTHY":
            self.is_open, self._away_since = True, None
        elif self.is_open or application is None:
            self._wait_for(gateway, now)

    def _wait_for(self, gateway: Any, now: float) -> None:
        said = "Serve knows of none" if gateway is None else gateway.message or gateway.status
        if gateway is not None and gateway.status_trigger == "REPLICA_STARTUP_FAILED":
            raise DMD2Error(f"the gateway ended, and cannot be started again: {said}")
        if self._away_since is None:
            self._away_since = now
        if now - self._away_since > PATIENCE_S:
            raise DMD2Error(f"the gateway has been away for {PATIENCE_S:g} seconds: {said}")
