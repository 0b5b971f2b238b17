"""scripts/verify: that a right machine passes, that a wrong one fails, and what it leaves."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import environment
import numpy as np
import pytest
import torch
import verify_cli
import verify_pictures
import verify_report
import verify_rows
from components import write_checker
from model_folders import give_card
from random_model import write_random_model
from unknown_words import WORDS_FILE, unknown_words
from verify_pictures import Made

from dmd2.engine import batch_limits
from dmd2.errors import DeviceMemoryError
from dmd2.fast.compiled import compile_no_more
from dmd2.fast.ways import WAYS, Way
from dmd2.models import vae
from dmd2.sampling import pipeline
from dmd2.sampling.rehearsal import choose_ways
from dmd2.settings import ROOT, Settings

Verify = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Verify:
    """Runs it, with two prompts; its rows by name."""
    monkeypatch.setenv("DMD2_DEVICE", "cpu")
    monkeypatch.setenv("DMD2_MAX_BATCH", "2")
    monkeypatch.setattr(verify_report, "give_back_memory", lambda: None)  # half a second each
    monkeypatch.setattr(verify_rows, "PROMPTS", verify_pictures.PROMPTS[:2])

    def run(model: str | Path, *arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
        report = tmp_path / "report.json"
        try:
            verify_cli.main([str(model), "--report", str(report), *arguments])
            ended: Any = 0
        except SystemExit as error:
            ended = error.code
        assert bool(ended) == bool(code), ended
        content = json.loads(report.read_text())
        assert {"device", "versions", "commit", "command", "model", "date"} <= content.keys()
        rows = {row["row"]: row for row in content["rows"]}
        assert content["failed"] == [name for name, row in rows.items() if row["passed"] is False]
        assert all(name in str(ended) for name in content["failed"])
        return rows

    return run


def test_a_right_machine_passes(verify: Verify, one_step_folder: Path) -> None:
    rows = verify(one_step_folder, "--precisions", "bfloat16", "float32")
    assert list(rows) == [
        "hashes",
        "stock, float32",
        "ours plain, float32",
        "ours fast, float32",
        "stock, bfloat16",
        "ours plain, bfloat16",
        "ours fast, bfloat16",
        "safety checker",
        "speed",
    ]
    exact, half = rows["ours plain, float32"], rows["ours plain, bfloat16"]
    assert exact["largest"] <= 1
    assert exact["passed"]
    assert exact["bar_db"] == verify_rows.FLOAT32_DB
    assert half["bar_db"] == pytest.approx(rows["stock, bfloat16"]["psnr_db"] - 3)
    assert half["passed"]
    assert rows["ours fast, float32"]["passed"]
    assert set(exact["ways"].values()) == {"plain"}
    assert "plain" not in rows["ours fast, bfloat16"]["ways"].values()
    assert half["psnr_db"] < exact["psnr_db"]
    assert len(half["pictures"]) == 2
    assert rows["speed"]["latency_ms"] > 0
    assert rows["speed"]["images_per_s"] > 0
    assert set(rows["speed"]["goals"]) == {"latency_ms", "images_per_s"}


@pytest.mark.parametrize("first_to_fail", [0, 1])
def test_a_fast_way_that_did_not_make_every_picture_fails(
    first_to_fail: int, verify: Verify, one_step_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its first picture on, or from its second: plain makes the same ones in its place."""
    calls = itertools.count()

    def build(unet: Any) -> Callable[..., Any]:
        def call(*inputs: Any, **named: Any) -> Any:
            if next(calls) >= first_to_fail:
                raise RuntimeError("no kernel image is available")
            return unet(*inputs, **named)

        return call

    table = (Way("breaks", "step", build), *(way for way in WAYS if way.part == "decode"))
    monkeypatch.setattr(batch_limits, "choose_ways", partial(choose_ways, ways=table))
    row = verify(one_step_folder, code=1)["ours fast, float32"]
    assert row["passed"] is False
    assert row["problem"] == "fell back to plain: step"
    assert row["ways"]["step"] == ("plain" if first_to_fail == 0 else "breaks, plain")
    assert row["psnr_db"] >= row["bar_db"]


def test_pixels_that_are_a_little_wrong_fail(
    verify: Verify, one_step_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by one of 255."""
    to_uint8 = vae.to_uint8
    monkeypatch.setattr(vae, "to_uint8", lambda images: to_uint8(images).clamp(max=254) + 1)
    rows = verify(one_step_folder, code=1)
    assert rows["ours plain, float32"]["passed"] is False
    assert 48 < rows["ours plain, float32"]["psnr_db"] < verify_rows.FLOAT32_DB
    assert "speed" in rows, "what else there is to know is in the report"


def test_a_way_that_raises_is_a_row_that_failed(
    quick: None, verify: Verify, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(verify_rows, "by_us", fail)
    row = verify(model_folder, code=1)["ours plain, float32"]
    assert "no kernel image" in row["error"]


def test_each_way_that_serves_is_compared(
    verify: Verify, one_step_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled one where it is asked for, and what serves the sizes that graphs do not."""
    lean = {way.part: way for way in WAYS if way.name == "lean"}
    compiled = [
        replace(lean[way.part], name=way.name, suits=way.suits, compiles=True)
        for way in WAYS
        if way.compiles
    ]
    graph = replace(lean["step"], name="graph", keeps_memory=True)
    table = (*compiled, graph, *lean.values())
    monkeypatch.setattr(verify_rows, "WAYS", table)
    monkeypatch.setattr(batch_limits, "choose_ways", partial(choose_ways, ways=table))
    monkeypatch.setattr(pipeline, "compile_no_more", lambda: None)
    monkeypatch.setattr(verify_rows, "measure_speed", lambda *_: {"passed": None})
    monkeypatch.setenv("DMD2_COMPILE", "1")
    rows = verify(one_step_folder)
    taken = {name: row["ways"]["step"] for name, row in rows.items() if "ways" in row}
    assert taken == {
        "ours plain, float32": "plain",
        "ours fast, float32": "graph",
        "ours eager, float32": "lean",
        "ours compiled, float32": "compiled",
    }


def test_a_compiled_way_that_is_not_taken_fails(
    verify: Verify, one_step_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has none that compiles."""
    table = [way for way in WAYS if way.name == "lean"]
    monkeypatch.setattr(batch_limits, "choose_ways", partial(choose_ways, ways=table))
    monkeypatch.setattr(verify_rows, "measure_speed", lambda *_: {"passed": None})
    monkeypatch.setenv("DMD2_COMPILE", "1")
    row = verify(one_step_folder, code=1)["ours compiled, float32"]
    assert row["problem"] == "fell back to plain: step, decode"


def test_an_engine_that_compiled_lets_the_next_one_compile(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Mock()
    monkeypatch.setattr(verify_pictures, "open_engine", lambda _: engine)
    calls: list[object] = []
    double = torch.compile(lambda x: 2 * x, backend=lambda graph, _: calls.append(graph) or graph)

    def serve(_: object) -> None:
        double(torch.ones(1))
        compile_no_more()

    settings = Settings(model=str(model_folder), compile=True)
    for num_compiled in (1, 2):
        verify_pictures.with_engine(settings, serve)
        assert len(calls) == num_compiled


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey pictures, the same by all, at once."""
    grey = [np.full((64, 64, 3), 128, np.uint8)]
    monkeypatch.setattr(verify_rows, "by_stock", lambda *_: grey)
    monkeypatch.setattr(verify_rows, "by_us", lambda *_: Made(grey, []))
    monkeypatch.setattr(verify_rows, "measure_speed", lambda *_: {"passed": None})


@pytest.mark.parametrize("error", [DeviceMemoryError("full"), torch.OutOfMemoryError("full")])
def test_a_precision_that_stock_has_no_memory_for_is_a_row_and_no_failure(
    error: Exception,
    quick: None,
    verify: Verify,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without float32 the others are compared with stock diffusers in their own precision."""
    by_stock = verify_rows.by_stock

    def small_gpu(folder: Path, device: str, dtype: str, requests: Any) -> Any:
        if dtype == "float32":
            raise error
        return by_stock(folder, device, dtype, requests)

    monkeypatch.setattr(verify_rows, "by_stock", small_gpu)
    rows = verify(model_folder, "--precisions", "float32", "bfloat16")
    assert "out of memory" in rows["stock, float32"]["error"]
    assert "ours plain, float32" not in rows
    half = rows["ours plain, bfloat16"]
    assert half["against"] == "stock, bfloat16"
    assert half["bar_db"] == verify_rows.SAME_PRECISION_DB["bfloat16"]
    assert half["passed"]


@pytest.mark.parametrize("error", [DeviceMemoryError("full"), torch.OutOfMemoryError("full")])
def test_out_of_memory_fails_where_stock_had_enough(
    error: Exception,
    quick: None,
    verify: Verify,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(verify_rows, "by_us", fail)
    rows = verify(model_folder, code=1)
    for name in ("plain", "fast"):
        row = rows[f"ours {name}, float32"]
        assert row["passed"] is False
        assert row["error"] == "out of memory: full"
        assert "--precisions" in row["problem"]


def test_it_fails_where_stock_fits_in_no_precision(
    quick: None, verify: Verify, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then there is nothing to compare ours with."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(verify_rows, "by_stock", fail)
    rows = verify(model_folder, "--precisions", "float32", "bfloat16", code=1)
    assert not [name for name in rows if name.startswith("ours")]
    assert "DMD2_DEVICE=cpu" in rows["pictures"]["error"]


def test_pictures_are_compared_without_tf32_and_speed_is_measured_as_it_serves(
    quick: None, verify: Verify, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def note(name: str, result: Any) -> Callable[..., Any]:
        def noting(*_: object) -> Any:
            flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
            seen[name] = flags
            return result

        return noting

    for name in ("by_stock", "by_us"):
        monkeypatch.setattr(verify_rows, name, note(name, getattr(verify_rows, name)()))
    monkeypatch.setattr(verify_rows, "measure_speed", note("speed", {"passed": None}))
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        verify(model_folder)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert seen == {"by_stock": (False,) * 2, "by_us": (False,) * 2, "speed": (True,) * 2}


def test_damaged_weights_end_it_before_any_picture(
    verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "unet/diffusion_pytorch_model.safetensors has sha256 1, not 2"
    monkeypatch.setattr(verify_rows, "verify", lambda *_: [said])
    rows = verify("demo", code=1)
    assert list(rows) == ["hashes"]
    assert rows["hashes"]["problems"] == [said]


def test_the_demo_is_whole() -> None:
    manifest = verify_rows.Manifest.read()
    folder = ROOT / "weights" / "demo"
    assert verify_rows.check_hashes("demo", folder, manifest) == {"passed": True, "problems": []}


def test_what_cannot_run_is_a_row(verify: Verify, tmp_path: Path) -> None:
    rows = verify(tmp_path / "nothing", code=1)
    assert "neither an entry" in rows["model"]["error"]


def test_a_crash_leaves_the_rows_before_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_rows, "compare_all", crash)
    report = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        verify_cli.main([str(model_folder), "--report", str(report)])
    assert [row["row"] for row in json.loads(report.read_text())["rows"]] == ["hashes"]


@pytest.mark.parametrize("installed", [True, False])
def test_the_safety_checker_looks_at_the_pictures_where_it_is_installed(
    installed: bool, verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = give_card(
        write_random_model(tmp_path / "models" / "tiny"), {"1": [399]}, safety_checker="checker"
    )
    weights = tmp_path / "weights"
    weights.mkdir()
    if installed:
        write_checker(weights / "checker", nsfw_bias=100)
    monkeypatch.setenv("DMD2_WEIGHTS_DIR", str(weights))
    monkeypatch.setattr(verify_rows, "compare_all", lambda *_: None)
    monkeypatch.setattr(verify_rows, "measure_speed", lambda *_: {"passed": None})
    row = verify(folder)["safety checker"]
    if installed:
        assert row["passed"]
        assert row["flagged"] == [0, 1]
        assert all(score > 0.5 for score in row["nsfw_scores"])
    else:
        assert row["passed"] is None
        assert "scripts/download-weights checker" in row["said"]


def test_a_gpu_that_torch_cannot_use_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho GPU 0")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    no_cuda = "print('torch 2.11.0: the driver is too old')"
    monkeypatch.setattr(environment, "NO_CUDA", no_cuda)
    with pytest.raises(SystemExit, match=r"finds no CUDA \(torch 2.11.0: the driver is too old\)"):
        verify_cli.main(["demo", "--report", str(tmp_path / "report.json")])
    assert not (tmp_path / "report.json").exists()
    assert environment.why_without_cuda(sys.executable)


def test_pictures_are_compared_together() -> None:
    black = np.zeros((8, 8, 3), np.uint8)
    one = black.copy()
    one[0, 0, 0] = 5
    assert verify_pictures.psnr([black], [black]) == verify_pictures.IDENTICAL_DB
    assert verify_pictures.psnr([black], [black + 1]) == 48.13
    # One of 384 values is off by 5.
    expected = 10 * np.log10(255**2 / (25 / 384))
    assert verify_pictures.psnr([one, black], [black, black]) == pytest.approx(expected, abs=0.01)
    assert verify_pictures.largest([black, one], [black, black]) == 5
    assert verify_pictures.largest([black + 255], [black]) == 255


def test_the_prompts_are_the_readmes() -> None:
    readme = (ROOT / "README.md").read_text()
    for prompt in verify_pictures.PROMPTS:
        assert f"- *{prompt}*" in readme


@pytest.mark.parametrize("prompt", verify_pictures.DEMO_PROMPTS)
def test_the_demo_was_taught_its_prompts(prompt: str) -> None:
    assert unknown_words(prompt, WORDS_FILE.read_text().split()) == []
