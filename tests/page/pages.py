"""Pages under test, as scripts/page shows them, and the browser that looks at them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cog_server import free_port

from dmd2.settings import ROOT

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
STARTS_S = 240
SHOWN = "#pictures img[data-testid=detailed-image]"


def chromium() -> str | None:
    """Where it is."""
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return next(filter(None, found), None)


def why_no_browser() -> str | None:
    """What this machine lacks for the tests of the page in a browser; None where nothing."""
    if chromium() is None:
        return "there is no Chromium (Debian and Ubuntu: apt install chromium)"
    if not (ROOT / ".venv-page" / "complete").exists():
        return "the page's environment is not there: scripts/page makes it"
    if any(importlib.util.find_spec(name) is None for name in ("playwright", "gradio_client")):
        return "scripts/lib/python -m pip install -r tests/page/requirements.txt was not run"
    return None


@dataclass
class ShownPage:
    """A page that is shown: where, of which server, and by which process."""

    url: str
    server: str
    process: subprocess.Popen[str]


@contextmanager
def shown(*arguments: str, **environment: str) -> Iterator[ShownPage]:
    """scripts/page, from its start until it said where the page is; ended by SIGTERM."""
    command = [str(ROOT / "scripts" / "page"), "--port", str(free_port()), *arguments]
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    too_long = threading.Timer(STARTS_S, process.kill)
    too_long.start()
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        too_long.cancel()
        match = re.search(r"the page is at (\S+) \(server: (\S+)\)", said)
        assert match, f"it said {said!r} and ended with {process.wait()}"
        yield ShownPage(*match.groups(), process)
    finally:
        too_long.cancel()
        process.terminate()
        process.wait(20)


class Visit:
    """A visitor's tab; where its requests go is noted."""

    def __init__(self, browser: Any, url: str, width: int = 1280, dark: bool = False) -> None:
        height = 900 if width > 800 else 844
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
        )
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(url)
        self.tab.wait_for_selector("#generate")

    def fill(self, name: str, value: str) -> None:
        """An input's box."""
        self.tab.locator(f"#input-{name} :is(input, textarea)").first.fill(value)

    def value(self, name: str) -> str:
        """What its box holds."""
        return str(self.tab.locator(f"#input-{name} :is(input, textarea)").first.input_value())

    def becomes(self, name: str, value: str) -> None:
        """Wait until its box holds a value."""
        self.tab.wait_for_function(
            "([box, value]) => document.querySelector(box)?.value === value",
            arg=[f"#input-{name} :is(input, textarea)", value],
        )

    def choose(self, name: str, choice: str) -> None:
        """One of an input's buttons."""
        self.tab.locator(f"#input-{name} label").get_by_text(choice, exact=True).click()

    def chosen(self, name: str) -> str:
        """The button that is down."""
        return str(self.tab.locator(f"#input-{name} label.selected").inner_text()).strip()

    def generate(self) -> None:
        """Click, and wait for pictures: each has a place of its own, so it is seen to change."""
        before = self.tab.evaluate(f"document.querySelector('{SHOWN}')?.src ?? ''")
        self.tab.locator("#generate").click()
        self.tab.wait_for_function(
            f"before => (document.querySelector('{SHOWN}')?.src ?? before) != before", arg=before
        )
        self.tab.locator("#generate").wait_for()

    def fail(self, said: str) -> None:
        """Click, and wait for an error that says so."""
        self.tab.locator("#generate").click()
        self.tab.locator("#notice .error").get_by_text(said).wait_for()
        self.tab.locator("#generate").wait_for()

    def text(self, part: str) -> str:
        """What a part of the page says."""
        return str(self.tab.locator(part).inner_text())

    def fact(self, name: str) -> str:
        """One of the facts beside the picture."""
        return str(self.tab.locator(f"#details dl div:has(dt:text-is('{name}')) dd").inner_text())

    def save(self, folder: Path) -> Path:
        """The picture on show, by the gallery's own button."""
        with self.tab.expect_download() as download:
            self.tab.locator("#pictures button[aria-label=Download]").click()
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path


@contextmanager
def chromium_running() -> Iterator[Any]:
    """Chromium with an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
