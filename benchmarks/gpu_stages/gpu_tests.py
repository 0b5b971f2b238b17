"""The tests that need a GPU, but for those that take minutes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dmd2.settings import ROOT
from gpu_stages.scene import Scene

_COUNTS = ("tests", "failures", "errors", "skipped")


def run(scene: Scene) -> dict[str, Any]:
    """How many there were, and which failed; they are skipped where there is no GPU.

    Its problem, which fails the run, says how many failed.
    """
    found = scene.scratch / "tests.xml"
    os.chdir(ROOT)
    # Without pyproject's own options, which ask for several processes.
    options = ["-m", "gpu and not compiles", "-o", "addopts=", "-p", "no:cacheprovider", "-rfEs"]
    # Collecting the others would need Cog's packages.
    marked = [p for p in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    code = pytest.main([*map(str, marked), *options, f"--junitxml={found}"])
    if not found.is_file():
        raise RuntimeError(f"pytest ended with {code!r} and no report")
    suites = list(ElementTree.parse(found).getroot().iter("testsuite"))
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in _COUNTS}
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts["passed"] = counts["tests"] - sum(counts[name] for name in _COUNTS[1:])
    headline = ", ".join(f"{number} {name}" for name, number in counts.items())
    about = {"headline": headline, "problem": problem(int(code), counts), "exit_code": int(code)}
    return {**about, **counts, "failed": failed}


def problem(code: int, counts: Mapping[str, int]) -> str | None:
    """What is wrong, by pytest's exit status; None where all passed or were skipped."""
    if bad := counts["failures"] + counts["errors"]:
        return f"{bad} of {counts['tests']} tests failed"
    return f"pytest ended with {code}" if code else None
