"""The stages of the one run on a GPU: what each measures, and what it holds that to."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_stages import goals, plain, ways
from gpu_stages.scene import Scene
from gpu_stages.timing import measured
from gpu_stages.work import Work

from dmd2.fast.ways import PLAIN, WAYS, Facts, Part, Way
from dmd2.sampling.pipeline import Pipeline


def test_a_stage_makes_the_model_where_the_one_before_it_failed(tmp_path: Path) -> None:
    result = plain.run(Scene(tmp_path, tmp_path, dry=True))
    assert [row["error"] for row in result["rows"]] == [None, None]
    assert result["is_finite"]


@pytest.mark.parametrize("part", ["step", "decode"])
def test_ways_and_plain_are_measured_against_float32(
    part: Part, new_pipeline: Callable[..., Pipeline]
) -> None:
    work = Work(new_pipeline("bfloat16"))
    scene = Scene(Path(), Path(), dry=True)
    with torch.inference_mode():
        rows = ways.rows_of_part(scene, work, part)
    assert [row["error"] for row in rows] == [None] * len(rows)
    facts = Facts(torch.device("cpu"), torch.bfloat16)
    suiting = {way.name for way in WAYS if way.part == part and way.suits(facts) is None}
    assert {row["way"] for row in rows} == {PLAIN, *suiting} > {PLAIN}
    for row in rows:
        assert len(row["to_plain"]) == len(row["to_float32"]) == (2 if part == "step" else 1)
        assert all(1e-3 < error < 0.1 for error in row["to_float32"]), "bfloat16 rounds to 2^-9"
        assert (row["pixels_mean"] is None) == (part == "step")
        assert row["ms"] > 0


def test_ways_are_measured_while_none_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What setup chose would count in the memory of every row."""
    held: list[weakref.ref[torch.nn.Module]] = []
    seen: list[str] = []

    def choose(pipeline: Pipeline, *_: object) -> None:
        for runner in (pipeline.unet, pipeline.vae):
            model = torch.nn.Identity()
            held.append(weakref.ref(model))
            runner.adopt(Way("chosen", runner.part, lambda plain: plain), model)

    def rows_of_part(scene: Scene, work: Work, part: Part) -> list[Any]:
        seen.extend([work.pipeline.unet.way, work.pipeline.vae.way])
        assert [model() for model in held] == [None, None]
        return []

    monkeypatch.setattr(ways, "choose_ways", choose)
    monkeypatch.setattr(ways, "rows_of_part", rows_of_part)
    result = ways.run(Scene(tmp_path, tmp_path, dry=True))
    assert result["chosen"] == {"step": "chosen", "decode": "chosen"}
    assert seen == [PLAIN] * 4


def test_a_way_that_raises_is_a_row(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plain: object) -> None:
        raise ValueError("no such kernel")

    broken = [Way("no kernel", "step", fail), Way("bad call", "step", lambda plain: None)]
    monkeypatch.setattr(ways, "WAYS", broken)
    work = Work(pipeline)
    with torch.inference_mode():
        rows = ways.rows_of_part(Scene(Path(), Path(), dry=True), work, "step")
    by_way = {row["way"]: row for row in rows}
    assert by_way["plain"]["error"] is None
    assert by_way["no kernel"]["error"] == "ValueError: no such kernel"
    assert "TypeError" in by_way["bad call"]["error"]
    assert by_way["bad call"]["ms"] is None


def test_out_of_memory_is_a_row() -> None:
    def fail() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    row = measured({"batch": 8}, ("step_ms",), fail)
    assert row == {
        "batch": 8,
        "error": "out of memory: CUDA out of memory. Tried to allocate",
        "step_ms": None,
    }
    with pytest.raises(ZeroDivisionError):
        measured({"batch": 8}, ("step_ms",), lambda: {"step_ms": 1 / 0})


@pytest.mark.parametrize(
    ("measured_ms", "verdict"), [(30, "good"), (36, "reached"), (36.1, "missed"), (None, "not")]
)
def test_a_goal_is_reached_or_missed(measured_ms: float | None, verdict: str) -> None:
    rows = [
        {"part": "decode", "way": "lean", "batch": 1, "ms": measured_ms, "verdict": "passes"},
        {"part": "decode", "way": "lean", "batch": 4, "ms": 3, "verdict": "passes"},
        {"part": "decode", "way": "wrong", "batch": 1, "ms": 1, "verdict": "is too far from plain"},
    ]
    results = {} if measured_ms is None else {"ways": {"rows": rows}}
    (row,) = [r for r in goals.compare(results) if r["goal"].startswith("decode")]
    assert row["verdict"].startswith(verdict)
