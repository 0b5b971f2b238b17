"""How the tests are run: with what in the environment, in what order, and what is skipped."""

from __future__ import annotations

import gc
import os
import shutil

# Two test processes on two cores: more threads than that only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable, Generator
from importlib.util import find_spec
from typing import Any

import pytest

# Two processes take whole files, in the order that they are collected in: the longest go first, or
# one of them works alone at the end.
LONGEST = ("test_compile.py", "test_train_command.py", "test_faults.py", "test_training.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="fuzz and soak at full size: half an hour")
    parser.addoption("--demo", action="store_true", help="many engines of the demo: -m scale")
    parser.addoption("--pictures", metavar="FOLDER", help="take the README's pictures of the page")


def pytest_configure(config: pytest.Config) -> None:
    """Import what the tests share where they run, and not where they are only spread: slow."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        for name in ("model_world", "hub_world", "hostile_web"):
            config.pluginmanager.import_plugin(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run, and begin with what takes long."""
    import torch
    from gateway.clients import why_no_clients
    from model_folders import SDXL
    from page.pages import why_no_browser

    from dmd2.store.manifest import quick_problems

    items.sort(key=lambda item: (*LONGEST, item.path.name).index(item.path.name))
    reasons: dict[str, Callable[[], str | None]] = {
        "gpu": lambda: None if torch.cuda.is_available() else "torch sees no CUDA GPU",
        "docker": lambda: None if os.environ.get("DMD2_IMAGE") else "DMD2_IMAGE names no image",
        "prometheus": lambda: (
            None
            if shutil.which("prometheus") and shutil.which("promtool")
            else "prometheus or promtool is not installed (Debian: apt install prometheus)"
        ),
        "scale": lambda: (
            None if find_spec("ray") else "Ray is missing: use `scripts/test -m scale`"
        ),
        "weights": lambda: "sdxl-4step is not installed" if quick_problems(SDXL) else None,
        "browser": why_no_browser,
        "clients": why_no_clients,
    }
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker) and (why := reason()):
                item.add_marker(pytest.mark.skip(reason=why))


def pytest_collection_finish() -> None:
    """What is imported by now stays: Python need not look through it again for what is unused."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Where DMD2_IMAGE names an image, nothing that needs it may be skipped."""
    report = yield
    is_skip = report.skipped and not hasattr(report, "wasxfail")
    if is_skip and item.get_closest_marker("docker") and os.environ.get("DMD2_IMAGE"):
        report.outcome = "failed"
        report.longrepr = f"skipped, though DMD2_IMAGE is set: {report.longrepr}"
    return report
