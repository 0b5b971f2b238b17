"""Models that are made of files which the repository ships: nothing is fetched for them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from dmd2.errors import DownloadError
from dmd2.store.install import install
from dmd2.store.manifest import Manifest, sha256_of, verify, write_record
from dmd2.store.provision import provided

CONTENT = {"a.txt": "one", "variants/b.txt": "two"}


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A checkout's weights: own/ is shipped whole, made/ is to be made of it."""
    weights = tmp_path / "weights"
    for path, text in CONTENT.items():
        (weights / "own" / path).parent.mkdir(parents=True, exist_ok=True)
        (weights / "own" / path).write_text(text)
    write_record(weights / "own", {"model": "own"})
    files = {
        path: {
            "size": len(text),
            "sha256": sha256_of(weights / "own" / path),
        }
        for path, text in CONTENT.items()
    }
    manifest = {
        "repositories": {
            "own": {"bundled": "own", "repo": "own", "license": "CC0", "files": files}
        },
        "models": {
            "own": {"kind": "component", "files": {"a.txt": "own/a.txt"}},
            "made": {"kind": "component", "files": {"a.txt": "own/variants/b.txt"}},
        },
        "refused": {},
    }
    (weights / "manifest.json").write_text(json.dumps(manifest))
    return weights


def make(name: str, shipped: Path, weights_dir: Path | None = None) -> Path:
    manifest = Manifest.read(shipped / "manifest.json")
    return install(name, weights_dir or shipped, manifest=manifest, say=lambda _: None)


def test_it_needs_no_download(shipped: Path) -> None:
    model = Manifest.read(shipped / "manifest.json").models["made"]
    assert model.download_size == 0
    folder = make("made", shipped)
    assert (folder / "a.txt").read_text() == "two"
    assert verify(model, folder) == []


def test_what_is_shipped_stays(shipped: Path) -> None:
    make("made", shipped)
    assert {path: (shipped / "own" / path).read_text() for path in CONTENT} == CONTENT


def test_what_is_shipped_whole_is_installed(shipped: Path) -> None:
    before = (shipped / "own" / "a.txt").stat().st_mtime_ns
    assert make("own", shipped) == shipped / "own"
    assert (shipped / "own" / "a.txt").stat().st_mtime_ns == before


def test_another_folder_for_weights_gets_its_own(shipped: Path, tmp_path: Path) -> None:
    for name, text in (("own", "one"), ("made", "two")):
        assert (make(name, shipped, tmp_path / "elsewhere") / "a.txt").read_text() == text


@pytest.mark.parametrize("text", [None, "wto", "three"])
def test_a_damaged_file_is_named_with_the_way_out(shipped: Path, text: str | None) -> None:
    path = shipped / "own" / "variants" / "b.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DownloadError, match=f"git checkout {path}"):
        make("made", shipped)
    assert not (shipped / "made").exists()


def test_a_damaged_shipped_model_is_not_made_of_itself(shipped: Path) -> None:
    (shipped / "own" / "a.txt").unlink()
    with pytest.raises(DownloadError, match=r"git checkout -- .*own"):
        make("own", shipped)
    assert (shipped / "own" / "variants" / "b.txt").exists()


@pytest.mark.parametrize("way", ["relative", "link", "link inside"])
def test_what_is_shipped_stays_however_its_path_is_written(
    way: str, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for another folder, it was made anew of itself, and lost all that was not installed."""
    monkeypatch.chdir(tmp_path)
    weights_dir = {"relative": Path("weights"), "link": Path("linked")}.get(way, Path("other"))
    if way == "link":
        weights_dir.symlink_to(shipped)
    elif way == "link inside":
        weights_dir.mkdir()
        (weights_dir / "own").symlink_to(shipped / "own")
    before = {path: path.stat().st_mtime_ns for path in shipped.rglob("*")}
    make("own", shipped, weights_dir)
    (shipped / "own" / "a.txt").write_text("damaged")
    with pytest.raises(DownloadError, match="git checkout"):
        make("own", shipped, weights_dir)
    assert {path for path in shipped.rglob("*") if path.name[0] != "."} == set(before)


def test_where_nothing_can_be_written_it_is_made_in_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_text("")
    with provided("demo-1step", tmp_path / "file" / "weights", Manifest.read()) as folder:
        assert folder.is_relative_to(tmp_path)
        assert folder.parent.stat().st_mode & 0o077 == 0
        assert verify(Manifest.read().models["demo-1step"], folder) == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_download_that_cannot_be_written_says_where_it_could(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    weights_dir, manifest = tmp_path / "file" / "weights", Manifest.read()
    with (
        pytest.raises(DownloadError, match=r"takes none \(Not a directory\).*DMD2_WEIGHTS_DIR.*-v"),
        provided("sdxl-4step", weights_dir, manifest, download=True),
    ):
        pass
