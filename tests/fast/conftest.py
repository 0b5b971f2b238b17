"""Models for the faster ways, and what is left of them when a way has been taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dmd2.fast import group_norm
from dmd2.models.loading import ModelParts, load_parts
from dmd2.settings import ROOT


@pytest.fixture(scope="session", params=["tiny", "demo"])
def folder(request: pytest.FixtureRequest, model_folder: Path) -> Path:
    """The random tiny model, and the bundled one, which is trained."""
    return model_folder if request.param == "tiny" else ROOT / "weights" / "demo"


@pytest.fixture(scope="session")
def parts(folder: Path) -> ModelParts:
    return load_parts(folder, torch.device("cpu"), torch.float32)


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
