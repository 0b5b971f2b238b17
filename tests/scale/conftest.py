"""What the tests of many engines share."""

from __future__ import annotations

import pytest
from soak.server_under_load import KnownRequest, known_requests

from dmd2.sampling.pipeline import Pipeline


@pytest.fixture(scope="session")
def known(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> list[KnownRequest]:
    """Requests to the tiny model, and what an engine alone makes of them."""
    return known_requests(pipeline, tmp_path_factory.mktemp("alone"), 24)
