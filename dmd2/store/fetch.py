"""One file of the hub, at its pinned revision: fetched, resumed, verified."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from dmd2.errors import DownloadError
from dmd2.store.manifest import Manifest, SourceFile, gigabytes, sha256_of


def copy_of(source: SourceFile, cache: Path) -> Path:
    """Where one file is kept, whole or in part, until the installation succeeds."""
    if source.local is not None:
        return source.local
    return cache / source.repo.replace("/", "--") / source.revision / source.path


def fetch(source: SourceFile, cache: Path, manifest: Manifest, say: Callable[[str], None]) -> Path:
    """A verified local copy of one file; an interrupted transfer is taken up again.

    Raises:
        DownloadError: it could not be fetched, or is not what the manifest says.
        OSError: it could not be stored.
    """
    path = copy_of(source, cache)
    if source.local is not None:
        problem = _content_problem(source, path, manifest)
        if problem:
            is_shipped = any(source in model.sources for model in manifest.models.values())
            remedy = f"; `git checkout {path}` brings it back" if is_shipped else ""
            raise DownloadError(f"{path} {problem}{remedy}")
        return path
    say(f"  {source.repo}/{source.path} ({gigabytes(source.size)})")
    if path.is_file() and sha256_of(path) == source.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _transfer(source, path)
    except Exception as error:  # the client's many kinds: network, hub, disk
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise DownloadError(f"{source.repo}/{source.path} was not fetched: {error}") from error
    problem = _content_problem(source, path, manifest)
    if problem:
        path.unlink()
        raise DownloadError(f"{source.repo}/{source.path} {problem}; that copy was deleted")
    return path


def _transfer(source: SourceFile, path: Path) -> None:
    """Append to path what it lacks of the hub's file.

    hf_hub_download deletes what it has when it fails, so that 5 GB would begin again.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    try:
        with path.open("ab") as file:
            http_get(
                hf_hub_url(source.repo, source.path, revision=source.revision),
                file,
                resume_size=path.stat().st_size,
                headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                displayed_filename=source.path,
            )
    except HfHubHTTPError as error:
        if error.response.status_code == 416:  # it has all of the file's bytes, and wrong ones
            path.unlink()
            raise DownloadError("what was there of it was damaged, and was deleted") from error
        raise


def _content_problem(source: SourceFile, path: Path, manifest: Manifest) -> str | None:
    if not path.is_file():
        return "is missing"
    size, found = path.stat().st_size, sha256_of(path)
    if found in manifest.refused:
        return f"is refused: {manifest.refused[found]}"
    if source.is_exact_size and size != source.size:
        return f"has {size} bytes, and the manifest says {source.size}"
    if found != source.sha256:
        return f"has sha256 {found}, and the manifest says {source.sha256}"
    return None
