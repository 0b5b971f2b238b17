"""Drawings come from npm once, are the pinned ones, and are rasterised as they are drawn."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from training.demo.drawings import Drawings, DrawingsError, Package

ICONS = {
    "half": {"body": '<path fill="#f00" d="M0 0h16v32H0z"/>'},
    "veil": {"body": '<path fill="#0000ff" fill-opacity=".5" d="M0 0h32v32H0z"/>'},
}


def archive(icons: dict[str, dict[str, str]]) -> bytes:
    """What npm packs."""
    content = json.dumps({"icons": icons, "width": 32, "height": 32}).encode()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


DATA = archive(ICONS)
PACKAGE = Package("@tests/drawings", "1.0.0", hashlib.sha256(DATA).hexdigest())


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm that packs the tests' drawings, and notes each time that it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "packed.tgz").write_bytes(DATA)
    script = folder / "npm"
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, shutil, sys\n"
        f"asked = pathlib.Path({str(tmp_path / 'asked')!r})\n"
        "asked.write_text((asked.read_text() if asked.exists() else '') + ' '.join(sys.argv[1:]))\n"
        "if 'none' in sys.argv[-1]: sys.exit('404 no such package')\n"
        f"shutil.copy({str(folder / 'packed.tgz')!r}, 'tests-drawings-1.0.0.tgz')\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.defpath}")
    return tmp_path / "asked"


def test_they_are_fetched_once(npm: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert Drawings.fetched(tmp_path / "runs", PACKAGE).picture("half", 8).shape == (8, 8, 4)
    assert npm.read_text() == "pack --ignore-scripts @tests/drawings@1.0.0"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [PACKAGE.archive]


def test_others_than_the_pinned_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / PACKAGE.archive
    path.write_bytes(archive({}))
    with pytest.raises(DrawingsError, match=f"{PACKAGE.sha256} is pinned: delete it"):
        Drawings.fetched(tmp_path, PACKAGE)


def test_what_npm_says_is_told(npm: Path, tmp_path: Path) -> None:
    missing = Package("@tests/none", "1.0.0", "")
    with pytest.raises(DrawingsError, match=r"404 no such package.*or put tests-none-1\.0\.0\.tgz"):
        Drawings.fetched(tmp_path / "runs", missing)
    assert not list((tmp_path / "runs").iterdir())


def test_without_npm_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DrawingsError, match="install it, or put tests-drawings"):
        Drawings.fetched(tmp_path / "runs", PACKAGE)


def test_a_drawing_has_its_colours_and_its_coverage() -> None:
    drawings = Drawings({name: icon["body"] for name, icon in ICONS.items()}, 32)
    half = drawings.picture("half", 8)
    assert np.allclose(half[:, :4], (1, 0, 0, 1), atol=0.01)
    assert np.allclose(half[:, 4:], 0)
    assert np.allclose(drawings.picture("veil", 8), (0, 0, 0.5, 0.5), atol=0.01)
    assert drawings.picture("half", 8) is half, "rasterised once"
    with pytest.raises(KeyError, match="whole"):
        drawings.picture("whole", 8)
