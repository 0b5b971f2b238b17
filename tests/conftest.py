"""What the tests share: a tiny model in SDXL's shape, stock diffusers on it, and real servers."""

from __future__ import annotations

import os

# Two test processes on two cores: more threads than that only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cog_server import CogServer
from model_folders import SDXL, give_card
from random_model import write_random_model
from servers import start

from dmd2.engine.batch_limits import warm_up
from dmd2.engine.engine import Engine
from dmd2.fast.tuning import Tuning
from dmd2.sampling.pipeline import Pipeline
from dmd2.store.manifest import quick_problems

pytest_plugins = ["hub_world", "hostile_web"]
# Two processes take whole files, in the order that they are collected in: the longest go first, or
# one of them works alone at the end.
LONGEST = ("test_compile.py", "test_train_command.py", "test_faults.py", "test_training.py")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-step model at 64x64 that may also run in 2 steps."""
    folder = write_random_model(tmp_path_factory.mktemp("models") / "tiny")
    return give_card(folder, {"4": [999, 749, 499, 249], "2": [999, 499]})


@pytest.fixture(scope="session")
def one_step_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 1-step model."""
    folder = write_random_model(tmp_path_factory.mktemp("models") / "tiny-1step", seed=1)
    return give_card(folder, {"1": [399]})


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> Pipeline:
    return Pipeline.load(model_folder, "cpu")


@pytest.fixture(scope="session")
def forced_pipeline(model_folder: Path) -> Pipeline:
    """The same model with every fast way in use."""
    pipeline = Pipeline.load(model_folder, "cpu")
    warm_up(pipeline, 4, Tuning("force"))
    assert (pipeline.unet.way, pipeline.vae.way) == ("lean", "lean")
    return pipeline


@pytest.fixture
def engine(pipeline: Pipeline, tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(pipeline, tmp_path / "outputs")
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared server's home, tmp, LoRAs and outputs, and its log."""
    folder = tmp_path_factory.mktemp("server")
    for name in ("home", "tmp", "loras"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="session")
def server(model_folder: Path, server_folder: Path) -> Iterator[CogServer]:
    """Cog's server on the tiny model, READY: for all who leave it as it was."""
    environment = {
        "DMD2_OUTPUT_DIR": str(server_folder / "outputs"),
        # What is measured on a busy machine may be that nothing is worth sharing.
        "DMD2_MAX_BATCH": "4",
        # Every fast way that there is, so that all that tests a server tests these.
        "DMD2_TUNE": "force",
        "DMD2_LORA_SOURCES": "local",
        "DMD2_LORA_DIR": str(server_folder / "loras"),
        "HOME": str(server_folder / "home"),
        "TMPDIR": str(server_folder / "tmp"),
    }
    with (
        (server_folder / "log").open("wb") as log,
        start(model_folder, log, **environment) as server,
    ):
        status = server.wait_until_set_up(120)["status"]
        assert status == "READY", (server_folder / "log").read_text(errors="replace")[-4000:]
        yield server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="fuzz and soak at full size: half an hour")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run, and begin with what takes long."""
    items.sort(key=lambda item: (*LONGEST, item.path.name).index(item.path.name))
    reasons: dict[str, Callable[[], str | None]] = {
        "gpu": lambda: None if torch.cuda.is_available() else "torch sees no CUDA GPU",
        "docker": lambda: None if os.environ.get("DMD2_IMAGE") else "DMD2_IMAGE names no image",
        "weights": lambda: "sdxl-4step is not installed" if quick_problems(SDXL) else None,
    }
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker) and (why := reason()):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Where DMD2_IMAGE names an image, nothing that needs it may be skipped."""
    report = yield
    is_skip = report.skipped and not hasattr(report, "wasxfail")
    if is_skip and item.get_closest_marker("docker") and os.environ.get("DMD2_IMAGE"):
        report.outcome = "failed"
        report.longrepr = f"skipped, though DMD2_IMAGE is set: {report.longrepr}"
    return report
