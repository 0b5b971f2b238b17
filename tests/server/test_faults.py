"""What the real server does when its worker dies, its GPU breaks, or its setup fails."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from servers import start, worker_of

BROKEN = """
import predict
from dmd2.sampling.pipeline import Pipeline

Pipeline.is_broken = lambda self: True
Pipeline.step = lambda self, samples: 1 / 0
Pipeline.decode = lambda self, samples: 1 / 0

class Predictor(predict.Predictor):
    pass
"""


@dataclass(frozen=True)
class Life:
    """What a server did from its first request to its violent end.

    Attributes:
        lines: of its log.
        ports: that its worker listens on.
        good, refused, unsaved, saved: the answers to a request that succeeds, to one that breaks a
            rule, and to one while its disk takes nothing and to another thereafter.
        healths: the health while the disk takes nothing, and thereafter.
        health_s: how long the first of them took.
        exit_code: of the server, five seconds after its worker was killed; None if it lived on.
    """

    lines: list[str]
    ports: list[int]
    good: dict[str, Any]
    refused: dict[str, Any]
    unsaved: dict[str, Any]
    saved: dict[str, Any]
    healths: tuple[str, str]
    health_s: float
    exit_code: int | None


# How each server is run, and what kills its worker; a SIGSEGV is tests/soak/test_chaos.py's.
LIVES: dict[str, tuple[dict[str, str], signal.Signals]] = {
    "text": ({}, signal.SIGABRT),
    "json": ({"DMD2_LOG_FORMAT": "json", "HF_TOKEN": "hf_verysecret"}, signal.SIGKILL),
}


@pytest.fixture(scope="module")
def lives(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Life]:
    """The life of a server, lived once."""
    return cache(lambda name: live(model_folder, tmp_path_factory.mktemp(name), *LIVES[name]))


def live(model: Path, folder: Path, environment: dict[str, str], end: signal.Signals) -> Life:
    outputs = folder / "outputs"
    environment = {**environment, "DMD2_OUTPUT_DIR": str(outputs)}
    outputs.write_text("no folder")
    with (folder / "log").open("wb") as log, start(model, log, **environment) as server:
        assert server.wait_until_set_up(120)["status"] == "UNHEALTHY"
        outputs.unlink()
        ports = ports_of(worker_of(server))
        good = server.predict({"prompt": "a secret circle", "seed": 5}, id="good-one")
        refusal = {"prompt": "a secret " * 80, "negative_prompt": "secret"}
        refused = server.predict(refusal, id="refused-one")
        shutil.rmtree(outputs)
        outputs.write_text("no folder")
        began = time.monotonic()
        unhealthy = server.health()["status"]
        health_s = time.monotonic() - began
        unsaved = server.predict({"prompt": "a secret square", "seed": 6}, id="unsaved-one")
        outputs.unlink()
        healthy = server.health()["status"]
        saved = server.predict({"prompt": "a secret square", "seed": 6}, id="saved-one")
        os.kill(worker_of(server), end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(timeout=5)
        exit_code = server.process.poll()
    lines = (folder / "log").read_text().splitlines()
    healths = (unhealthy, healthy)
    return Life(lines, ports, good, refused, unsaved, saved, healths, health_s, exit_code)


def ports_of(process: int) -> list[int]:
    connections = psutil.Process(process).net_connections("inet")
    return [each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN]


@pytest.mark.parametrize("name", LIVES)
def test_a_dead_worker_ends_the_server(name: str, lives: Callable[[str], Life]) -> None:
    assert lives(name).exit_code not in (None, 0)


@pytest.mark.parametrize("name", LIVES)
def test_the_health_check_sees_a_disk_that_takes_nothing(
    name: str, lives: Callable[[str], Life]
) -> None:
    life = lives(name)
    assert life.healths == ("UNHEALTHY", "READY")
    assert life.health_s < 0.5
    assert life.unsaved["status"] == "failed"
    assert "could not be saved" in life.unsaved["error"]
    assert (life.good["status"], life.saved["status"]) == ("succeeded", "succeeded")


@pytest.mark.parametrize("name", LIVES)
def test_the_log_holds_no_prompts(name: str, lives: Callable[[str], Life]) -> None:
    assert not any("secret" in line for line in lives(name).lines)


def test_nothing_listens_but_the_server_unless_metrics_are_asked_for(
    lives: Callable[[str], Life],
) -> None:
    assert lives("text").ports == []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert ports_of(os.getpid()) == [listener.getsockname()[1]], "or this could not fail"


def test_the_log_names_predictions(lives: Callable[[str], Life]) -> None:
    life = lives("json")
    lines = [line for line in life.lines if "the worker has died" not in line]
    messages = [json.loads(line)["fields"].get("message", "") for line in lines]
    ours = [json.loads(message) for message in messages if message.startswith('{"time"')]
    (done,) = [each for each in ours if each.get("prediction") == "good-one"]
    assert "1 images of 64x64 from seed 5" in done["message"]
    (failed,) = [each for each in ours if each.get("prediction") == "unsaved-one"]
    assert failed["level"] == "error"
    assert "GenerationError" in failed["traceback"]
    told = life.good["logs"] + life.unsaved["logs"]
    assert "traceback" not in told.lower(), "that is for the operator"


def test_errors_hold_nothing_of_the_environment(lives: Callable[[str], Life]) -> None:
    life = lives("json")
    answers = json.dumps([life.good, life.refused, life.unsaved])
    assert "hf_verysecret" not in "\n".join(life.lines) + answers
    assert sys.executable not in answers


def test_setup_that_fails_leaves_a_server_that_says_why(tmp_path: Path) -> None:
    with start("sdxl-4step", DMD2_WEIGHTS_DIR=str(tmp_path)) as server:
        health = server.wait_until_set_up(120)
        assert health["status"] == "SETUP_FAILED"
        time.sleep(3)  # longer than a watchdog waits
        assert server.process.poll() is None
        for logs in (health["setup"]["logs"], server.health()["setup"]["logs"]):
            for words in ("scripts/download-weights sdxl-4step", "7.1 GB", "DMD2_DOWNLOAD=1"):
                assert words in logs


def test_a_device_beyond_repair_ends_the_server(model_folder: Path, tmp_path: Path) -> None:
    """CUDA refuses all work of a process after some errors: only a new process helps."""
    (tmp_path / "broken_predict.py").write_text(BROKEN)
    stub = {"COG_PREDICT_TYPE_STUB": f"{tmp_path}/broken_predict.py:Predictor"}
    with start(model_folder, **stub) as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        with contextlib.suppress(httpx.TransportError, RuntimeError):
            assert server.predict({"prompt": "x"})["status"] == "failed"
        assert server.process.wait(timeout=5) != 0
