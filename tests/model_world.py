"""What the tests share: a tiny model in SDXL's shape, stock diffusers on it, and real servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from cog_server import CogServer, free_port
from model_folders import StockDiffusers, give_card
from random_model import write_random_model
from servers import start

from dmd2.engine.batch_limits import warm_up
from dmd2.engine.engine import Engine
from dmd2.fast.tuning import Tuning
from dmd2.model_card import ModelCard
from dmd2.models.loading import ModelParts, load_parts
from dmd2.sampling.pipeline import Pipeline


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
def stock(model_folder: Path) -> StockDiffusers:
    """Stock diffusers on the model, for all who leave it as it is."""
    return StockDiffusers(model_folder)


@pytest.fixture(scope="session")
def parts_in(model_folder: Path) -> Callable[[str], ModelParts]:
    """The model in a dtype, each loaded once: most of what a pipeline costs."""
    return cache(lambda dtype: load_parts(model_folder, torch.device("cpu"), getattr(torch, dtype)))


@pytest.fixture(scope="session")
def new_pipeline(
    model_folder: Path, parts_in: Callable[[str], ModelParts]
) -> Callable[..., Pipeline]:
    """Makes pipelines in a dtype, plain at first, that share their models and nothing else."""
    return lambda dtype="float32": Pipeline(ModelCard.read(model_folder), parts_in(dtype))


@pytest.fixture
def own_pipeline(new_pipeline: Callable[..., Pipeline]) -> Pipeline:
    """One for a test that gives it ways."""
    return new_pipeline()


@pytest.fixture(scope="session")
def pipeline(new_pipeline: Callable[..., Pipeline]) -> Pipeline:
    """One that stays plain."""
    return new_pipeline()


@pytest.fixture(scope="session")
def forced_pipeline(new_pipeline: Callable[..., Pipeline]) -> Pipeline:
    """One with every fast way in use."""
    pipeline = new_pipeline()
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
def metrics_port() -> int:
    """Where the shared server tells its metrics."""
    return free_port()


@pytest.fixture(scope="session")
def server(model_folder: Path, server_folder: Path, metrics_port: int) -> Iterator[CogServer]:
    """Cog's server on the tiny model, READY: for all who leave it as it was."""
    environment = {
        "DMD2_OUTPUT_DIR": str(server_folder / "outputs"),
        # Every fast way that there is, so that all that tests a server tests these.
        "DMD2_TUNE": "force",
        "DMD2_LORA_SOURCES": "local",
        "DMD2_LORA_DIR": str(server_folder / "loras"),
        "DMD2_METRICS_PORT": str(metrics_port),
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
