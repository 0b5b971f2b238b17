"""When scripts/serve-many gives up on a gateway that Ray runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deploy.gateway.many.gateway_watch import DEPLOYMENT, PATIENCE_S, GatewayWatch
from dmd2.errors import DMD2Error


def application(status: str, trigger: str = "UNSPECIFIED", message: str = "") -> Any:
    """What Serve says where its gateway stands so, and its engines are away."""
    gateway = SimpleNamespace(status=status, status_trigger=trigger, message=message)
    engines = SimpleNamespace(
        status="UNHEALTHY", status_trigger="REPLICA_STARTUP_FAILED", message="no weights"
    )
    return SimpleNamespace(deployments={DEPLOYMENT: gateway, "Engine": engines})


OPEN, AWAY = application("HEALTHY"), application("UNHEALTHY", "HEALTH_CHECK_FAILED", "it is ill")
GIVEN_UP = application("UNHEALTHY", "REPLICA_STARTUP_FAILED", "port 5000 cannot be listened on")


def watched(*looks: tuple[Any, float]) -> GatewayWatch:
    watch = GatewayWatch()
    for seen, now in looks:
        watch.look(seen, now)
    return watch


def test_a_gateway_may_take_its_time_to_start() -> None:
    starting = application("UPDATING", "CONFIG_UPDATE_STARTED")
    watch = watched((starting, 0.0), (starting, 10 * PATIENCE_S))
    assert not watch.is_open
    watch.look(OPEN, 10 * PATIENCE_S + 1)
    assert watch.is_open


def test_one_that_comes_back_is_no_end_however_often() -> None:
    looks = [(each, PATIENCE_S * 0.9 * n) for n, each in enumerate([OPEN, AWAY] * 3)]
    assert watched(*looks, (None, 5 * PATIENCE_S), (OPEN, 6 * PATIENCE_S)).is_open


def test_one_that_cannot_be_started_again_is_the_end_at_once() -> None:
    with pytest.raises(DMD2Error, match="cannot be started again: port 5000 cannot be listened on"):
        watched((OPEN, 0.0), (AWAY, 1.0), (GIVEN_UP, 2.0))


@pytest.mark.parametrize(("away", "said"), [(AWAY, "it is ill"), (None, "Serve knows of none")])
def test_one_that_is_away_for_long_is_the_end(away: Any, said: str) -> None:
    watch = watched((OPEN, 0.0), (away, 50.0), (away, 50.0 + PATIENCE_S))
    with pytest.raises(DMD2Error, match=f"away for 120 seconds: {said}"):
        watch.look(away, 51.0 + PATIENCE_S)
