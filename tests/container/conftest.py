"""Where DMD2_IMAGE names an image, nothing that needs it may be skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("DMD2_IMAGE"):
        report.outcome = "failed"
        report.longrepr = f"skipped, though DMD2_IMAGE is set: {report.longrepr}"
