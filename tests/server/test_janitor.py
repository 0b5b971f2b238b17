"""Old outputs go, and nothing else does."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import dmd2.server.janitor
from dmd2.server.janitor import ALL_NAMES, OUTPUT_NAMES, Janitor, sweep

OURS = "0123456789abcdef" * 2


def put(path: Path, age_s: float) -> Path:
    """A file of that age, in a folder of that age."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"pixels")
    for each in (path, path.parent):
        os.utime(each, (time.time() - age_s,) * 2)
    return path


def test_only_folders_of_requests_that_are_old_throughout_go(tmp_path: Path) -> None:
    old = put(tmp_path / OURS / "a-0.png", 100)
    young = put(tmp_path / OURS[::-1] / "a-0.png", 5)
    growing = put(tmp_path / ("f" * 32) / "a-0.png", 100)
    put(growing.with_name("a-1.png"), 5)
    os.utime(growing.parent, (time.time() - 100,) * 2)
    foreign = put(tmp_path / "holiday" / "a-0.png", 100)
    assert sweep(tmp_path, OUTPUT_NAMES, max_age_s=50) == 1
    assert not old.parent.exists()
    assert all(path.exists() for path in (young, growing, foreign))


def test_links_are_not_followed(tmp_path: Path) -> None:
    precious = put(tmp_path / "elsewhere" / "a-0.png", 100)
    swept = tmp_path / "outputs"
    swept.mkdir()
    link = swept / OURS
    link.symlink_to(precious.parent)
    os.utime(link, (time.time() - 100,) * 2, follow_symlinks=False)
    assert sweep(swept, ALL_NAMES, max_age_s=50) == 1
    assert precious.exists()
    assert not link.is_symlink()


def test_a_folder_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    assert sweep(tmp_path / "nothing", ALL_NAMES, max_age_s=1) == 0


def test_another_that_deletes_meanwhile_does_no_harm(tmp_path: Path) -> None:
    entries = [put(tmp_path / f"{n:032x}" / "a" / "b-0.png", 5).parent.parent for n in range(300)]
    other = threading.Thread(target=lambda: [shutil.rmtree(entry) for entry in entries])
    other.start()
    while other.is_alive():
        sweep(tmp_path, ALL_NAMES, max_age_s=50)
    other.join()
    assert list(tmp_path.iterdir()) == []


def test_it_sweeps_by_itself_and_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = put(tmp_path / "prediction" / "output", 100)
    tries = []

    def fail_at_first(*args: Any) -> int:
        tries.append(args)
        if len(tries) == 1:
            raise PermissionError(13, "Permission denied")
        return sweep(*args)

    monkeypatch.setattr(dmd2.server.janitor, "sweep", fail_at_first)
    janitor = Janitor([(tmp_path, ALL_NAMES)], max_age_s=50, every_s=0.01)
    deadline = time.monotonic() + 20
    while old.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    janitor.close()
    assert len(tries) > 1
