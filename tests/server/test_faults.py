"""What the real server does when its worker dies, its GPU breaks, or it is told to stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_dead_worker_ends_the_server(
    number: signal.Signals, model_folder: Path, tmp_path: Path
) -> None:
    with start(model_folder, DMD2_OUTPUT_DIR=str(tmp_path)) as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        os.kill(worker_of(server), number)
        assert server.process.wait(timeout=5) != 0


def test_a_killed_server_leaves_no_worker_behind(model_folder: Path, tmp_path: Path) -> None:
    """It would go on for half a minute with what nobody can receive."""
    with start(model_folder, DMD2_OUTPUT_DIR=str(tmp_path), DMD2_MAX_BATCH="1") as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        worker = worker_of(server)
        inputs = {"prompt": "a red circle", "num_outputs": 4, "width": 1024, "height": 1024}
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(server.predict, inputs)
            time.sleep(0.5)
            server.process.kill()
            assert isinstance(answer.exception(), httpx.TransportError)
        server.process.wait()
        deadline = time.monotonic() + 5
        while Path(f"/proc/{worker}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_server_that_is_told_to_stop_finishes_what_it_accepted(
    model_folder: Path, tmp_path: Path
) -> None:
    with start(model_folder, DMD2_OUTPUT_DIR=str(tmp_path), DMD2_MAX_BATCH="1") as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        inputs = {"prompt": "a red circle", "num_outputs": 4, "width": 256, "height": 256}
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(server.predict, {**inputs, "seed": i}) for i in range(4)]
            while server.health()["status"] != "BUSY" and not answers[0].done():
                time.sleep(0.01)
            time.sleep(0.2)  # all four are in, and there is work for longer than that
            server.process.terminate()
            assert all(answer.result()["status"] == "succeeded" for answer in answers)
        assert server.process.wait(timeout=10) == 0


def test_setup_that_fails_leaves_a_server_that_says_why(tmp_path: Path) -> None:
    with start(tmp_path / "nothing") as server:
        health = server.wait_until_set_up(120)
        assert health["status"] == "SETUP_FAILED"
        time.sleep(3)  # longer than a watchdog waits
        assert server.process.poll() is None
        assert "neither an entry" in server.health()["setup"]["logs"]


def test_a_device_beyond_repair_ends_the_server(model_folder: Path, tmp_path: Path) -> None:
    """CUDA refuses all work of a process after some errors: only a new process helps."""
    (tmp_path / "broken_predict.py").write_text(BROKEN)
    stub = {"COG_PREDICT_TYPE_STUB": f"{tmp_path}/broken_predict.py:Predictor"}
    with start(model_folder, DMD2_MAX_BATCH="4", **stub) as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        with contextlib.suppress(httpx.TransportError, RuntimeError):
            assert server.predict({"prompt": "x"})["status"] == "failed"
        assert server.process.wait(timeout=5) != 0


def test_the_health_check_sees_a_disk_that_takes_nothing(
    model_folder: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "a file, and no folder"
    gone.write_text("")
    with start(model_folder, DMD2_OUTPUT_DIR=str(gone / "outputs")) as server:
        server.wait_until_set_up(120)
        began = time.monotonic()
        assert server.health()["status"] == "UNHEALTHY"
        assert time.monotonic() - began < 0.5
        answer = server.predict({"prompt": "x"})
        assert answer["status"] == "failed"
        assert "could not be saved" in answer["error"]
        gone.unlink()
        assert server.health()["status"] == "READY"
        assert server.predict({"prompt": "x"})["status"] == "succeeded"


def log_of(model_folder: Path, log: Path, **environment: str) -> tuple[list[str], list[Any]]:
    """The lines of a server's log, and its answers to a good and a failing request."""
    from cog_server import running

    environment = {"DMD2_MODEL": str(model_folder), "DMD2_DEVICE": "cpu", **environment}
    with log.open("wb") as file, running(environment, file) as server:
        server.wait_until_set_up(120)
        good = server.predict({"prompt": "a secret circle", "seed": 5}, id="good-one")
        server.predict({"prompt": "a secret " * 80, "negative_prompt": "secret"}, id="refused-one")
        blocker = Path(environment["DMD2_OUTPUT_DIR"])
        for old in blocker.rglob("*"):
            if old.is_file():
                old.unlink()
        for old in blocker.iterdir():
            old.rmdir()
        blocker.rmdir()
        blocker.write_text("")
        bad = server.predict({"prompt": "a secret square", "seed": 6}, id="bad-one")
    return log.read_text().splitlines(), [good, bad]


def test_the_log_names_predictions_and_no_prompts(model_folder: Path, tmp_path: Path) -> None:
    lines, (good, bad) = log_of(
        model_folder,
        tmp_path / "log",
        DMD2_OUTPUT_DIR=str(tmp_path / "out"),
        DMD2_LOG_FORMAT="json",
    )
    assert (good["status"], bad["status"]) == ("succeeded", "failed")
    assert not any("secret" in line for line in lines)
    messages = [json.loads(line)["fields"].get("message", "") for line in lines]
    ours = [json.loads(message) for message in messages if message.startswith('{"time"')]
    (done,) = [each for each in ours if each.get("prediction") == "good-one"]
    assert "1 images of 64x64 from seed 5" in done["message"]
    (failed,) = [each for each in ours if each.get("prediction") == "bad-one"]
    assert failed["level"] == "error"
    assert "GenerationError" in failed["traceback"]
    assert "traceback" not in (good["logs"] + bad["logs"]).lower(), "that is for the operator"


def test_prompts_are_logged_when_asked_for(model_folder: Path, tmp_path: Path) -> None:
    lines, _ = log_of(
        model_folder, tmp_path / "log", DMD2_OUTPUT_DIR=str(tmp_path / "out"), DMD2_LOG_PROMPTS="1"
    )
    assert any("[good-one]" in line and "'a secret circle'" in line for line in lines)


def test_errors_hold_nothing_of_the_environment(model_folder: Path, tmp_path: Path) -> None:
    environment = {"HF_TOKEN": "hf_verysecret", "DMD2_OUTPUT_DIR": str(tmp_path / "out")}
    lines, answers = log_of(model_folder, tmp_path / "log", **environment)
    assert "hf_verysecret" not in "\n".join(lines) + json.dumps(answers)
    assert sys.executable not in json.dumps(answers)
