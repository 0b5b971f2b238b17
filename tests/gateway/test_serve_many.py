"""scripts/serve-many as its user runs it, with one engine; with more it is tests/scale's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cog_server import free_port
from gateway.serve_many import STARTS_S, environment, is_ready, serving

from deploy.gateway.many import serve_many_cli
from dmd2.engine.breakdown import EXIT_BROKEN
from dmd2.settings import ROOT

TOKEN = {"Authorization": "Bearer sesame"}


@pytest.mark.parametrize(
    ("arguments", "more", "said"),
    [
        (["--host", "0.0.0.0"], {}, "DMD2_API_TOKEN is not set"),
        (["--host", "::"], {"DMD2_API_TOKEN": ""}, "DMD2_API_TOKEN is not set"),
        (["--engines", "2", "--host", "0.0.0.0"], {}, "DMD2_API_TOKEN is not set"),
        (["--engines", "0"], {}, "--engines 0"),
        (["--ray-address", "127.0.0.1:6379"], {}, "--engines 2 or more"),
        ([], {"PORT": "70000"}, "PORT='70000' is not a port"),
        ([], {"DMD2_MAX_QUEUED": "many"}, "DMD2_MAX_QUEUED='many'"),
        (["--model", "none"], {"DMD2_MODEL_": "x"}, "did you mean DMD2_MODEL?"),
    ],
)
def test_it_refuses_before_a_model_is_loaded(
    arguments: list[str],
    more: dict[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve-many", *arguments])
    for name, value in {"DMD2_JOURNAL_DIR": str(tmp_path / "journal"), **more}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        serve_many_cli.main()
    assert end.value.code != 0
    assert said in str(end.value.code) + capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_was_accepted_is_answered_after_sigterm(model_folder: Path, tmp_path: Path) -> None:
    """And what comes then is not taken; the whole ends by itself, and leaves no files."""
    with (
        serving(model_folder, tmp_path, DMD2_API_TOKEN="sesame") as (url, process),
        ThreadPoolExecutor(12) as pool,
    ):
        inputs = {"prompt": "hush", "width": 256, "height": 256, "num_inference_steps": 2}
        asking = [pool.submit(ask, url, {**inputs, "seed": seed}) for seed in range(12)]
        while under_way(url) < 12:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        while is_ready(url):
            time.sleep(0.02)
        refused = threading.Event()
        with httpx.Client(base_url=url, trust_env=False, headers=TOKEN) as http:
            if not all(one.done() for one in asking):
                answer = http.post("/predictions", json={"input": inputs})
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) > 0
                refused.set()
        answers = [one.result() for one in asking]
        assert [answer["status"] for answer in answers] == ["succeeded"] * 12
        assert [answer["metrics"]["seeds"] for answer in answers] == [[n] for n in range(12)]
        assert process.wait(60) == 0
        assert refused.is_set()
    log = (tmp_path / "log").read_text()
    assert f"the gateway is at {url}" in log
    assert "Traceback" not in log
    assert "hush" not in log
    assert list((tmp_path / "outputs").iterdir()) == []


def ask(url: str, inputs: dict[str, Any]) -> dict[str, Any]:
    body = {"input": inputs}
    answer = httpx.post(
        f"{url}/predictions", json=body, headers=TOKEN, timeout=STARTS_S, trust_env=False
    )
    return dict(answer.json())


def under_way(url: str) -> float:
    text = httpx.get(f"{url}/metrics", headers=TOKEN, trust_env=False).text
    (line,) = [each for each in text.splitlines() if each.startswith("dmd2_gateway_in_progress ")]
    return float(line.split()[1])


def test_a_model_that_cannot_be_loaded_is_told(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("imports torch for one line: with --full")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    done = subprocess.run(
        [ROOT / "scripts" / "serve-many", "--model", "model"],
        cwd=tmp_path,
        env=environment(PORT=str(free_port()), DMD2_JOURNAL_DIR=str(tmp_path / "journal")),
        capture_output=True,
        text=True,
        timeout=STARTS_S,
    )
    assert done.returncode == 1
    assert "the engine cannot be opened: " in done.stderr
    assert "unet/config.json is missing" in done.stderr
    assert "Traceback" not in done.stderr


HANGING = """
import os
import threading
from pathlib import Path

from dmd2.sampling.pipeline import Pipeline

step = Pipeline.step

def hanging(self, samples):
    if Path(os.environ["HANGS"]).exists():
        threading.Event().wait()
    return step(self, samples)

Pipeline.step = hanging
"""


def test_its_only_engine_hangs(
    model_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """It ends with an error, and what was accepted is done when it is started again."""
    if not request.config.getoption("--full"):
        pytest.skip("starts two gateways: with --full")
    (tmp_path / "sitecustomize.py").write_text(HANGING)
    hangs = tmp_path / "hangs"
    more = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "HANGS": str(hangs),
        "DMD2_RUN_TIMEOUT_S": "5",
    }
    inputs = {"prompt": "hush", "seed": 3}
    with serving(model_folder, tmp_path, **more) as (url, process):
        hangs.touch()
        later = {"Prefer": "respond-async"}
        body = {"id": "later", "input": inputs}
        answer = httpx.post(f"{url}/predictions", json=body, headers=later, trust_env=False)
        assert answer.status_code == 202
        assert process.wait(60) == EXIT_BROKEN
    assert "in one unit of work for 5 s, so this process ends" in (tmp_path / "log").read_text()
    hangs.unlink()
    with serving(model_folder, tmp_path, **more) as (url, _):
        ended: dict[str, Any] = {}
        while ended.get("status") not in ("succeeded", "failed"):
            ended = httpx.get(f"{url}/v1/predictions/later", trust_env=False).json()
            time.sleep(0.05)
    assert ended["status"] == "succeeded", ended
    assert ended["metrics"]["attempts"] == 2
