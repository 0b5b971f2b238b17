"""Models for the faster ways, and what is left of them when a way has been taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from dmd2.fast import group_norm
from dmd2.models.loading import ModelParts, load_parts
from dmd2.settings import ROOT


@pytest.fixture(scope="session")
def trained() -> ModelParts:
    """The bundled model, in float32."""
    return load_parts(ROOT / "weights" / "demo", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session", params=["tiny", "demo"])
def parts(
    request: pytest.FixtureRequest, parts_in: Callable[[str], ModelParts], trained: ModelParts
) -> ModelParts:
    """The random tiny model, and the trained one."""
    return trained if request.param == "demo" else parts_in("float32")


@pytest.fixture(params=["as on a CPU", "all split"])
def norms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous GroupNorms by ATen, as on a CPU, and by the split one, as long rows on CUDA."""
    if request.param == "all split":
        monkeypatch.setattr(group_norm, "LEFT_TO_ATEN", {})


@pytest.fixture
def for_inference() -> Iterator[None]:
    """As the pipeline calls its models."""
    with torch.inference_mode():
        yield


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """The log so far."""
    caplog.set_level(logging.INFO, "dmd2.fast")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)
