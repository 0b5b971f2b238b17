"""What the gateway reads of its environment."""

from __future__ import annotations

import pytest

from deploy.gateway.settings import GatewaySettings
from dmd2.errors import DMD2Error
from dmd2.settings import Settings


def test_the_engine_s_limits_are_the_engine_s() -> None:
    settings = GatewaySettings.from_environment({})
    engine = Settings("any")
    for name in ("queue_timeout_s", "run_timeout_s", "keep_outputs_s", "max_output_bytes"):
        assert getattr(settings, name) == getattr(engine, name)
    environ = {
        "DMD2_QUEUE_TIMEOUT_S": "1",
        "DMD2_RUN_TIMEOUT_S": "2",
        "DMD2_KEEP_OUTPUTS_S": "999",
        "DMD2_MAX_OUTPUT_BYTES": "123456",
    }
    settings = GatewaySettings.from_environment(environ)
    assert (settings.queue_timeout_s, settings.run_timeout_s) == (1, 2)
    assert (settings.keep_outputs_s, settings.max_output_bytes) == (999, 123456)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("DMD2_RUN_TIMEOUT_S", "soon", "DMD2_RUN_TIMEOUT_S='soon' is not a number of seconds"),
        ("DMD2_KEEP_OUTPUTS_S", "10", "DMD2_KEEP_OUTPUTS_S=10 is less than"),
        ("DMD2_MAX_QEUED", "1", "did you mean DMD2_MAX_QUEUED"),
        ("DMD2_MAX_QUEUED", "-1", "DMD2_MAX_QUEUED='-1' is not a number from 0 to"),
    ],
)
def test_a_limit_that_is_none_is_refused(name: str, value: str, said: str) -> None:
    with pytest.raises(DMD2Error, match=said):
        GatewaySettings.from_environment({name: value})
