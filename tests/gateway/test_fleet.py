"""How many engines are asked for, and what Ray's processes are told before any of them starts."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.gateway.engines.fleet import Fleet
from deploy.gateway.many import ray_cluster
from deploy.gateway.many.ray_serve import Site, serve
from deploy.gateway.settings import GatewaySettings
from dmd2.errors import DMD2Error
from dmd2.settings import ROOT, Settings


@pytest.mark.parametrize(
    ("text", "least", "most"), [("1", 1, 1), ("3", 3, 3), ("1-4", 1, 4), ("2-2", 2, 2)]
)
def test_a_number_or_two(text: str, least: int, most: int) -> None:
    fleet = Fleet.of(text)
    assert (fleet.min_engines, fleet.max_engines) == (least, most)


@pytest.mark.parametrize("text", ["", "0", "0-2", "3-2", "-1", "1-", "two", "1-2-3", "1025", "٣"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(DMD2Error, match=r"--engines .*1-4"):
        Fleet.of(text)


def test_what_is_set_for_ray_stays_and_what_workers_import_comes_first() -> None:
    environ = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(["/own", str(ROOT)])}
    ray_cluster._settle(environ, ray_cluster._CHOICES)
    assert environ["RAY_AUTH_MODE"] == "disabled"
    assert environ["RAY_USAGE_STATS_ENABLED"] == "0"
    paths = environ["PYTHONPATH"].split(os.pathsep)
    assert sorted(paths) == sorted(["/own", str(ROOT), str(ROOT / "scripts" / "lib")])


def test_the_token_is_drawn_anew_and_nobody_else_can_read_it() -> None:
    tokens = set()
    for _ in range(2):
        environ: dict[str, str] = {}
        with ray_cluster._token(environ):
            path = Path(environ["RAY_AUTH_TOKEN_PATH"])
            assert path.parent.stat().st_mode & 0o077 == 0
            tokens.add(path.read_text())
        assert environ == {}
        assert not path.exists()
    assert len(tokens) == 2
    assert all(len(token) >= 32 for token in tokens)


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_is_set_stays(name: str) -> None:
    environ = {name: "mine"}
    with ray_cluster._token(environ):
        assert environ == {name: "mine"}
    assert environ == {name: "mine"}


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DMD2Error, match=f"{port}.*PORT="):
            serve(Fleet(2, 2), a_site(tmp_path, port=port))


def test_nobody_listens_for_all_without_a_token(tmp_path: Path) -> None:
    with pytest.raises(DMD2Error, match="DMD2_API_TOKEN"):
        serve(Fleet(2, 2), a_site(tmp_path, host="0.0.0.0", port=0))


def a_site(folder: Path, **changes: Any) -> Site:
    def never(*_: Any) -> Any:
        raise AssertionError("something was started")

    gateway = replace(GatewaySettings(), journal_dir=folder)
    return replace(Site(Settings("demo"), gateway, never, never, "127.0.0.1", 0), **changes)
