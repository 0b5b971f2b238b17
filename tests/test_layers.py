"""The shape of the code: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dmd2.settings import ROOT

LEVELS = {
    "errors": 0,
    "model_card": 1,
    "settings": 1,
    "input_rules": 1,
    "device_work": 1,
    "watchdog": 0,
    "sampler": 2,
    "scheduling": 1,
    "lora": 1,
    "request": 2,
    "weights": 2,
    "health": 0,
    "janitor": 0,
    "logs": 2,
    "safety": 3,
    "fetch": 3,
    "download": 4,
    "provision": 5,
    "picture": 2,
    "deadlines": 1,
    "text_encoder": 3,
    "vae": 3,
    "image_io": 3,
    "strict_weights": 3,
    "loading": 4,
    "pipeline": 5,
    "job": 6,
    "delivery": 7,
    "batch_limits": 6,
    "engine": 8,
}
MODULES = sorted(p for p in (ROOT / "dmd2").glob("*.py") if p.stem != "__init__")


def imports_of(path: Path) -> set[str]:
    """The absolute names that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_module_has_a_level() -> None:
    assert {path.stem for path in MODULES} == set(LEVELS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_lower_levels(path: Path) -> None:
    for name in imports_of(path):
        package, _, module = name.partition(".")
        module = module.partition(".")[0]
        if package == "dmd2" and module in LEVELS:
            assert LEVELS[module] < LEVELS[path.stem], f"{path.stem} imports {module}"


@pytest.mark.parametrize("path", [*MODULES, ROOT / "predict.py"], ids=lambda path: path.stem)
def test_the_container_imports_no_neighbour(path: Path) -> None:
    tops = {name.partition(".")[0] for name in imports_of(path)}
    assert not tops & {"training", "deploy", "benchmarks", "tests", "ray", "peft"}


@pytest.mark.parametrize("module", ["request", "scheduling", "weights", "model_card", "download"])
def test_no_torch_where_none_is_needed(module: str) -> None:
    code = f"import sys, dmd2.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_files_and_functions_stay_readable(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 60, f"{path.stem}.{node.name}"
