"""What the tests of many engines share."""

from __future__ import annotations

from pathlib import Path

import pytest
from many import DEMO
from soak.server_under_load import KnownRequest, known_requests

from dmd2.sampling.pipeline import Pipeline


@pytest.fixture(scope="session")
def is_demo(request: pytest.FixtureRequest) -> bool:
    """Whether the engines have the demo."""
    return bool(request.config.getoption("--demo"))


@pytest.fixture(scope="session")
def model_folder(is_demo: bool, model_folder: Path) -> Path:
    """What the engines have."""
    return DEMO if is_demo else model_folder


@pytest.fixture(scope="session")
def known_of_the_demo(tmp_path_factory: pytest.TempPathFactory) -> list[KnownRequest]:
    """Requests to the demo, and what an engine alone makes of them."""
    pipeline = Pipeline.load(DEMO, "cpu")
    folder = tmp_path_factory.mktemp("demo")
    return known_requests(pipeline, folder, 24, num_inference_steps=4)


@pytest.fixture(scope="session")
def known(
    is_demo: bool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[KnownRequest]:
    """Requests to the engines' model, and what an engine alone makes of them."""
    if is_demo:
        found: list[KnownRequest] = request.getfixturevalue("known_of_the_demo")
        return found
    pipeline = request.getfixturevalue("pipeline")
    return known_requests(pipeline, tmp_path_factory.mktemp("alone"), 24)
