"""Replicate's official clients, where they are installed, and what their users do."""

from __future__ import annotations

import shutil
from pathlib import Path

from dmd2.settings import ROOT

HERE, INSTALLED = Path(__file__).parent, ROOT / ".venv-clients"
COMMANDS = {
    "python-1.0.7": [INSTALLED / "python-1/bin/python", HERE / "use_python_1.py"],
    "python-2.0.0b4": [INSTALLED / "python-2/bin/python", HERE / "use_python_2.py"],
    "js-1.4.0": [shutil.which("node") or "node", HERE / "use_js.mjs", INSTALLED / "js"],
}


def why_no_clients() -> str | None:
    """What this machine lacks for the tests with the clients; None where nothing."""
    if shutil.which("node") is None:
        return "there is no Node (Debian and Ubuntu: apt install nodejs npm)"
    if not (INSTALLED / "complete").exists():
        return "Replicate's clients are not there: tests/gateway/clients/install installs them"
    return None
