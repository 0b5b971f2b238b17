"""The scripts, run as a user runs them, from another folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import cog_server
import httpx
import numpy as np
import predict_cli
import pytest
from cog_server import CogServer, free_port
from model_folders import pixels_of
from PIL import Image
from unknown_words import remark_on

from dmd2.engine.engine import Engine
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.settings import ROOT


def user_environment(**more: str) -> dict[str, str]:
    """A user's environment, in which no virtual environment is active."""
    own = {"PATH": os.defpath, "DMD2_PYTHON": sys.executable, "DMD2_DEVICE": "cpu"}
    return {**os.environ, **own, **more}


def run(
    script: str, *arguments: str, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script with this test's own Python, so that it does not make an environment."""
    return subprocess.run(
        [ROOT / "scripts" / script, *arguments],
        cwd=cwd,
        env=user_environment(**environment),
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_predict_numbers_several_images_and_makes_an_engine_s_pixels(
    tmp_path: Path, model_folder: Path, new_pipeline: Callable[..., Pipeline]
) -> None:
    (tmp_path / "relative").symlink_to(model_folder)
    done = run(
        "predict", "-i", "prompt=x", "-i", "num_outputs=2", "-i", "output_format=jpg",
        "--json", '{"seed": 5, "embed_metadata": false}', "--model", "relative",
        "-e", "DMD2_DTYPE=bfloat16", "-o", "sub/out.jpg", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "out.0.jpg  seed 5" in done.stdout
    assert "out.1.jpg  seed 6" in done.stdout
    made = sorted((tmp_path / "sub").iterdir())
    assert [path.name for path in made] == ["out.0.jpg", "out.1.jpg"]
    engine = Engine(new_pipeline("bfloat16"), tmp_path / "engine")
    inputs = {"prompt": "x", "num_outputs": 2, "output_format": "jpg", "seed": 5}
    request = GenerationRequest.resolve(engine.card, **inputs)
    for path, expected in zip(made, engine.submit(request).result(timeout=60).paths, strict=True):
        assert np.array_equal(pixels_of(path), pixels_of(expected))
    engine.close()


@pytest.mark.parametrize(
    ("seeds", "withheld", "saved"),
    [
        ([5, 6, 7], [1], {"o.0.png": "seed 5", "o.2.png": "seed 7"}),
        ([5, 6], [0], {"o.1.png": "seed 6"}),
        ([5], [], {"o.png": "seed 5"}),
    ],
)
def test_images_keep_their_own_seed_and_number_where_others_were_withheld(
    seeds: list[int],
    withheld: list[int],
    saved: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outputs = ["data:image/png;base64,AAAA"] * len(saved)
    seconds = dict.fromkeys(("encode", "sample", "decode", "save"), 0.1)
    metrics = {"seeds": seeds, "seconds": seconds, "width": 8, "height": 8, "model": "m"}
    metrics |= {"predict_time": 1.0} | ({"withheld": withheld} if withheld else {})
    predict_cli.save({"metrics": metrics, "output": outputs, "logs": ""}, tmp_path / "o.png")
    told = capsys.readouterr().out.splitlines()[:-1]
    assert {line.split()[0].rsplit("/")[-1]: line.split("  ")[1] for line in told} == saved
    assert {path.name for path in tmp_path.iterdir()} == set(saved)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-i", "seed=7"], "a prompt is needed"),
        (["-i", "prompt=x", "-i", "sede=7"], "unknown input 'sede'"),
        (["-i", "prompt=x", "-i", "seed=seven"], "seed=seven"),
        (["-i", "prompt"], "NAME=VALUE"),
        (["--json", "{"], "--json {"),
        (["--json", "[]"], "a JSON object is needed"),
        (["--json", "@none.json"], "none.json"),
        (["-i", "prompt=x", "-o", "x.jpg"], "output_format"),
    ],
)
def test_predict_refuses_before_anything_starts(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    done = run("predict", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """scripts/predict in this process, failing with a server that runs; the models it asked for."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DMD2_MODEL", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def fail(server: object, said: str, *arguments: str) -> list[str]:
        models = []

        @contextmanager
        def running(environment: Mapping[str, str], log: object) -> Iterator[object]:
            models.append(environment["DMD2_MODEL"])
            yield server

        monkeypatch.setattr(cog_server, "running", running)
        monkeypatch.setattr(sys, "argv", ["predict", *arguments])
        with pytest.raises(SystemExit, match=said):
            predict_cli.main()
        assert not list(folder.iterdir())
        return models

    return fail


def test_predict_never_falls_back_from_a_model_that_was_asked_for(
    predict: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server whose setup has failed so is in tests/server/test_faults.py."""
    monkeypatch.setenv("DMD2_WEIGHTS_DIR", str(tmp_path / "none"))
    health = {"status": "SETUP_FAILED", "setup": {"logs": "`scripts/download-weights sdxl-1step`"}}
    failed = SimpleNamespace(wait_until_set_up=lambda timeout_s: health)
    for model in (["--model", "sdxl-1step"], ["-e", "DMD2_MODEL=sdxl-1step"]):
        asked = predict(failed, "weights sdxl-1step", "-i", "prompt=x", *model)
        assert asked == ["sdxl-1step"]


def test_predict_without_weights_says_what_it_uses_instead(tmp_path: Path) -> None:
    where = {"DMD2_WEIGHTS_DIR": str(tmp_path / "none")}
    done = run("predict", "-i", "prompt=a red zeppelin", "-i", "seed=7", cwd=tmp_path, **where)
    assert done.returncode == 0, done.stderr
    assert "the weights of sdxl-4step are not installed" in done.stderr
    assert "demo passes over what it was not taught: zeppelin. Its words are in" in done.stderr
    assert "output.png  seed 7  128x128  demo" in done.stdout
    with Image.open(tmp_path / "output.png") as image:
        assert image.size == (128, 128)
        assert "Seed: 7" in image.text["parameters"]
        assert b"/trainedAlgorithmicMedia<" in image.info["xmp"]


@pytest.mark.parametrize(
    ("prompt", "model", "said"),
    [
        ("a red circle", "demo", ""),
        ("a red zeppelin", "demo-1step", "not taught: zeppelin."),
        ("a fox left of a tree", "demo", "not taught: left of."),
        ("a red zeppelin", "sdxl-4step", ""),
        ("a red zeppelin", "my-models/demo", ""),
    ],
)
def test_only_the_demo_remarks_on_words(
    prompt: str, model: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    remark_on(prompt, model)
    err = capsys.readouterr().err
    assert said in err if said else err == ""


def test_serve_answers_and_ends_with_the_servers_code(
    tmp_path: Path, model_folder: Path, predict: Callable[..., list[str]]
) -> None:
    """And scripts/predict says why the server refuses a prediction."""
    port = free_port()
    environment = user_environment(
        DMD2_MODEL=str(model_folder), PORT=str(port), COG_MAX_CONCURRENCY="3"
    )
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [ROOT / "scripts" / "serve"], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    try:
        served = CogServer(port, server)
        assert served.wait_until_set_up(120)["status"] == "READY"
        assert served.predict({"prompt": "x"})["status"] == "succeeded"
        assert httpx.get(f"{served.url}/openapi.json").status_code == 200
        predict(served, "multiple of 8", "-i", "prompt=x", "-i", "width=100", "-i", "height=64")
        assert b'"num_slots":3' in (tmp_path / "log").read_bytes()
    finally:
        server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=20) == 0


@pytest.mark.parametrize(
    "script",
    ["predict", "serve", "serve-many", "page", "download-weights", "verify", "check", "test"],
)
def test_help_needs_no_environment(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / script, "--help"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "DMD2_PYTHON"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert len(done.stdout) > 40
    assert "making the Python environment" not in done.stderr


def test_help_inside_a_prompt_is_no_flag(tmp_path: Path) -> None:
    """A stand-in for Python shows which one the wrapper would have run."""
    scripts = tmp_path / "checkout" / "scripts" / "lib"
    scripts.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "lib" / "python", scripts)
    (scripts / "environment.py").write_text("print('/bin/echo')")
    for arguments, made in ((["-i", "prompt=a -h b --help c"], True), (["--version", "-h"], False)):
        done = subprocess.run(
            [scripts / "python", *arguments],
            env={"PATH": f"{Path(sys.executable).parent}:{os.defpath}"},
            capture_output=True,
            text=True,
        )
        assert ("prompt=a -h b --help c" in done.stdout) == made


def test_download_weights_lists_and_verifies(tmp_path: Path) -> None:
    listed = run("download-weights", "--list", cwd=tmp_path).stdout
    assert "sdxl-4step " in listed
    assert "7.1 GB" in listed
    where = {"DMD2_WEIGHTS_DIR": str(tmp_path / "none")}
    missing = run("download-weights", "sdxl-4step", "--verify", cwd=tmp_path, **where)
    assert missing.returncode != 0
    assert "no such folder" in missing.stderr
    useless = run("download-weights", "sdxl-4step", "--lora-scale", "0.5", cwd=tmp_path, **where)
    assert useless.returncode != 0
    assert "no LoRA" in useless.stderr
    unknown = run("download-weights", "sdxl", cwd=tmp_path)
    assert "sdxl-1step" in unknown.stderr
