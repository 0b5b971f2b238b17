"""The one run on a GPU, where there is none: that it ends whole, whatever ends before it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import on_a_gpu
import psutil
import pytest
from gpu_stages import gpu_tests
from gpu_stages.scene import Scene, Stage

from dmd2.settings import ROOT

NAMES = [stage.name for stage in on_a_gpu.STAGES]
# What a run on a GPU measures; its tables are rows, each of which has all of these.
ROWS = {
    "plain": {"batch", "error", "encode_ms", "step_ms", "decode_ms", "image_ms"}
    | {"peak_reserved_gb", "first_calls_s"},
    "ways": {"part", "way", "batch", "error", "build_s", "first_call_s", "ms", "of_plain"}
    | {"to_plain", "to_float32", "pixels_mean", "pixels_most", "verdict", "peak_reserved_gb"},
    "engine": {"clients", "error", "images", "images_per_s", "p50_ms", "p95_ms"}
    | {"images_a_step", "peak_reserved_gb"},
    "peers": {"batch", "peer", "error", "total_ms", "time_over_diffusers", "images_per_s"}
    | {"max_pixel_difference", "peak_gpu_gb", "encode_ms", "sample_ms", "decode_ms", "png_ms"},
}
KEYS = {
    "facts": {"gpu", "nvidia_smi", "cudnn", "free_gb", "versions", "ceilings", "multiprocessors"},
    "model": {"made_s", "size_gb"},
    "kernels": {"plain", "fast"},
    "plain": {"rows", "is_finite", "weights_gb", "load_s", "dtype", "size"},
    "setup": {"imports_s", "load_s", "warm_up_s", "first_image_s", "total_s", "log"},
    "ways": {"rows", "tuning_s", "chosen"},
    "engine": {"rows", "open_s", "limits", "settings", "ways"},
    "engine-plain": {"rows", "open_s", "limits", "settings", "ways"},
    "peers": {"rows", "latency_ratio", "throughput_ratio"},
    "tests": {"passed", "failures", "errors", "skipped", "failed", "exit_code", "problem"},
}


def test_a_dry_run_has_all_that_a_real_one_has(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "on_a_gpu.py", "--dry", "--out", tmp_path],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["stages"]) == set(KEYS) == set(NAMES)
    for name, keys in KEYS.items():
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result == summary["stages"][name]
        assert result.keys() >= keys | {"stage", "seconds", "headline"}
        for row in result.get("rows", ()):
            assert row.keys() >= ROWS[name.removesuffix("-plain")]
            assert row["error"] is None
    for goal in summary["goals"]:
        assert goal["measured"] is not None, goal
        assert goal["goal"] in done.stdout
    for way in ("plain", "fast"):
        for part in ("step", "decode"):
            kernels = summary["stages"]["kernels"][way][part]
            assert 0 < sum(kernel["share"] for kernel in kernels) <= 1.001
    assert {"gpu", "driver", "versions", "commit", "command", "seconds", "date"} <= summary.keys()
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == {}
    model = Path(summary["stages"]["model"]["folder"])
    assert not model.parent.exists(), "seven gigabytes of it on a GPU"


FAULTS = ("raise", "exit", "hang", None)


@pytest.mark.parametrize("shift", range(len(FAULTS)))
def test_a_fault_costs_its_own_stage_and_no_other(
    shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stage of the real table gets each fault in turn; what they do otherwise is quick."""
    faults = {name: FAULTS[(i + shift) % len(FAULTS)] for i, name in enumerate(NAMES)}
    asked = ",".join(f"{name}:{kind}" for name, kind in faults.items() if kind)
    monkeypatch.setenv("ON_A_GPU_FAULTS", asked)
    quickly = {"module": "quick_stage", "limit_s": 20, "usual_s": 0, "arguments": {}}
    stages = [replace(s, **quickly) for s in on_a_gpu.STAGES]
    stages = [replace(s, limit_s=1.5) if faults[s.name] == "hang" else s for s in stages]
    outcomes = run(stages, tmp_path)
    assert [outcome.name for outcome in outcomes] == NAMES
    said = {None: None, "raise": "asks {} to fail", "exit": "ended with 3", "hang": "killed after"}
    for outcome in outcomes:
        expected = said[faults[outcome.name]]
        assert (outcome.result is None) == (expected is not None), outcome
        assert (expected or "").format(outcome.name) in (outcome.problem or "")
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == NAMES
    assert {path.stem for path in tmp_path.glob("*.json")} == {
        name for name, kind in faults.items() if kind is None
    }


def run(stages: list[Stage], out: Path, until: float = 60) -> list[on_a_gpu.Outcome]:
    """With processes that start from nothing, so that each sees this test's environment."""
    scene = Scene(out, out, dry=False)
    processes = multiprocessing.get_context("spawn")
    return on_a_gpu.run_all(stages, scene, processes, time.monotonic() + until)


def quick(name: str, **more: Any) -> Stage:
    return Stage(name, "quick_stage", 0, 20, more)


def test_a_problem_fails_the_run_and_its_figures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [quick("first"), quick("tests", problem="2 of 41 tests failed")]
    outcomes = run(stages, tmp_path)
    monkeypatch.setattr(on_a_gpu, "run_all", lambda *_: outcomes)
    monkeypatch.setattr(on_a_gpu, "prepare_environment", lambda dry: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["on_a_gpu.py", "--dry", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        on_a_gpu.main()
    assert ended.value.code == 1
    told = capsys.readouterr().out.splitlines()
    assert json.loads(told[-1])["failed"] == {"tests": "2 of 41 tests failed"}
    assert told[1].endswith("FAILED: 2 of 41 tests failed")
    assert json.loads((tmp_path / "summary.json").read_text())["stages"]["tests"]["figure"] == 1


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("assert True", None),
        ("assert False", "1 of 2 tests failed"),
        ("pytest.skip()", None),
        ("pytest.exit('no driver')", "pytest ended with 2"),
    ],
)
def test_failed_tests_are_a_problem(
    body: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    test = f"@pytest.mark.gpu\ndef test_it():\n    {body}\n"
    also = "@pytest.mark.gpu\ndef test_also():\n    pass\n"
    (tmp_path / "tests" / "test_of_a_gpu.py").write_text(f"import pytest\n{also}{test}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "test_of_a_gpu", raising=False)
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    result = gpu_tests.run(Scene(tmp_path, tmp_path, dry=True))
    assert result["problem"] == problem
    assert result["passed"] + result["failures"] + result["skipped"] >= 1


def test_what_a_hanging_stage_has_started_ends_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    command = ["sh", "-c", f"echo $$ > {pid_file}; exec sleep 600"]
    (outcome,) = run([replace(quick("hangs", starts=command), limit_s=6)], tmp_path)
    assert "killed after" in str(outcome.problem)
    pid = int(pid_file.read_text())
    patience = time.monotonic() + 5  # it is killed, but a busy machine ends it when it gets to it
    while not has_ended(pid):
        assert time.monotonic() < patience
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_what_no_longer_fits_is_said_and_not_begun(tmp_path: Path) -> None:
    long = replace(quick("long"), usual_s=1000)
    outcomes = run([quick("first"), long, quick("last")], tmp_path)
    assert [outcome.problem is None for outcome in outcomes] == [True, False, True]
    assert "skipped" in str(outcomes[1])
    assert not (tmp_path / "long.json").exists()


def test_the_whole_run_ends_in_time(tmp_path: Path) -> None:
    hanging = quick("hangs", starts=["sleep", "600"])
    started = time.monotonic()
    outcomes = run([hanging, quick("after")], tmp_path, until=2)
    assert time.monotonic() - started < 20
    assert [outcome.problem is None for outcome in outcomes] == [False, False]


def test_an_old_result_is_not_taken_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run([quick("one")], tmp_path)[0].problem is None
    monkeypatch.setenv("ON_A_GPU_FAULTS", "one:exit")
    assert run([quick("one")], tmp_path)[0].problem is not None
    assert not (tmp_path / "one.json").exists()


def test_where_forked_stages_fail_each_imports_for_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they do where something has opened the GPU before; pytest is there only in a fork."""
    stages = [quick("first", refused="pytest"), quick("second", refused="pytest")]
    processes = multiprocessing.get_context("fork")
    scene = Scene(tmp_path, tmp_path, dry=False)
    outcomes = on_a_gpu.run_all(stages, scene, processes, time.monotonic() + 60)
    assert [outcome.problem for outcome in outcomes] == [None, None]
    assert "each stage imports for itself" in capsys.readouterr().out
