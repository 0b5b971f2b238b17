"""Installing a manifest entry: fetch its files, convert, then appear whole.

Everything is made in a hidden folder beside the final one and renamed at the end, so a model is
there complete or not at all. Fetched files stay until the installation succeeds: a second try
goes on where the first one stopped.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from dmd2.errors import DMD2Error, DownloadError, ReadOnlyWeightsError
from dmd2.model_card import CARD_FILE, read_json
from dmd2.settings import MAX_LORA_SCALE
from dmd2.store.convert import make_files
from dmd2.store.fetch import copy_of, fetch
from dmd2.store.manifest import (
    RECORD_FILE,
    Manifest,
    ManifestModel,
    gigabytes,
    quick_problems,
    write_record,
)

_DISK_MARGIN = 100_000_000


def to_stderr(line: str) -> None:
    """Where a line of progress goes by default."""
    print(line, file=sys.stderr, flush=True)


def install(
    name: str,
    weights_dir: Path,
    *,
    lora_scale: float = 1.0,
    manifest: Manifest | None = None,
    say: Callable[[str], None] = to_stderr,
) -> Path:
    """Install an entry of the manifest under weights_dir, unless it is there already.

    Raises:
        DownloadError: there is no such entry, or as install_model.
        ReadOnlyWeightsError: as install_model.
    """
    manifest = manifest or Manifest.read()
    if name not in manifest.models:
        raise DownloadError(f"{name!r} is not one of {', '.join(manifest.models)}")
    return install_model(manifest.models[name], weights_dir, lora_scale, manifest, say)


def install_model(
    model: ManifestModel,
    weights_dir: Path,
    lora_scale: float,
    manifest: Manifest,
    say: Callable[[str], None],
) -> Path:
    """Install what an entry describes under weights_dir, unless it is there already.

    Args:
        model: an entry of the manifest, or one that was made of it.
        weights_dir: the models' folder; the model becomes weights_dir/model.name.
        lora_scale: the strength that an entry with a LoRA merges it at, above 0 and at most 2.
        manifest: names the files that are refused.
        say: takes each line of progress.

    Returns:
        The installed folder.

    Raises:
        ReadOnlyWeightsError: weights_dir takes nothing; the text says how to give it a place.
        DownloadError: it could not be fetched, verified or stored. The text says why and what
            to do; an installation that was there before stays.
    """
    if not 0 < lora_scale <= MAX_LORA_SCALE:
        raise DownloadError(
            f"a LoRA scale of {lora_scale:g} is not above 0 and at most {MAX_LORA_SCALE:g}"
        )
    folder = weights_dir / model.name
    if _is_installed(model, folder, lora_scale):
        say(f"{model.name} is installed in {folder}; nothing to do")
        return folder
    with _lock_file(weights_dir) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever held the lock before may have installed this very model.
        if not _is_installed(model, folder, lora_scale):
            _install(model, weights_dir, lora_scale, manifest, say)
    return folder


def _lock_file(weights_dir: Path) -> IO[str]:
    try:
        weights_dir.mkdir(parents=True, exist_ok=True)
        return (weights_dir / ".lock").open("w")
    except OSError as error:
        raise ReadOnlyWeightsError(
            f"{weights_dir}, where weights are installed, takes none ({error.strerror}). Point "
            "DMD2_WEIGHTS_DIR to a folder that this user may write; in a container, mount one: "
            "`docker run -v /a/folder/of/that/user:/weights -e DMD2_WEIGHTS_DIR=/weights ...`"
        ) from error


def _install(
    model: ManifestModel,
    weights_dir: Path,
    lora_scale: float,
    manifest: Manifest,
    say: Callable[[str], None],
) -> None:
    name, folder = model.name, weights_dir / model.name
    cache, staging = weights_dir / ".downloads", weights_dir / f".installing-{name}"
    if _is_brought_along(model, folder):
        raise DownloadError(
            f"{folder} came with this repository and is damaged ({quick_problems(folder)[0]}); "
            f"`git checkout -- {folder}` brings it back"
        )
    try:
        _check_disk(model, weights_dir, cache)
        _say_licenses(model, say)
        fetched = {source: fetch(source, cache, manifest, say) for source in model.needed}
        shutil.rmtree(staging, ignore_errors=True)
        make_files(model, fetched, staging, lora_scale, say)
        _write_descriptions(model, staging, lora_scale)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    except (DMD2Error, OSError) as error:
        raise DownloadError(_advice(name, error, name in manifest.models)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for source, path in fetched.items():
        if source.local is None:
            path.unlink()
    say(f"installed {name} in {folder}")


def _is_installed(model: ManifestModel, folder: Path, lora_scale: float) -> bool:
    if quick_problems(folder):
        return False
    record, wanted = read_json(folder / RECORD_FILE), _details(model, lora_scale)
    if _is_brought_along(model, folder):
        return True
    # What needs no download is made anew when the repository brings other files or another card,
    # and so is what the user's own files are in.
    is_plain = model.download_size > 0 and model.own is None
    compared = wanted.keys() & {"lora_scale"} if is_plain else wanted
    return all(record.get(key) == wanted[key] for key in compared)


def _is_brought_along(model: ManifestModel, folder: Path) -> bool:
    """Whether a folder holds the very files that this repository ships, however it is written."""
    shipped = [source.local.resolve() for source in model.sources if source.local is not None]
    return any(folder.resolve() in path.parents for path in shipped)


def _check_disk(model: ManifestModel, weights_dir: Path, cache: Path) -> None:
    # Files that are converted are on the disk twice for a moment, the others are linked.
    converted = sum(file.size or file.source.size for file in model.files if file.is_made)
    needed = model.download_size + converted + _DISK_MARGIN
    copies = [copy_of(source, cache) for source in model.needed if source.local is None]
    needed -= sum(path.stat().st_size for path in copies if path.is_file())
    free = shutil.disk_usage(weights_dir).free
    if free < needed:
        raise DownloadError(
            f"{weights_dir} has {gigabytes(free)} free, and {gigabytes(needed)} are needed. "
            "Free some space, or set DMD2_WEIGHTS_DIR to a larger disk"
        )


def _say_licenses(model: ManifestModel, say: Callable[[str], None]) -> None:
    say(f"{model.name}: {len(model.sources)} files, {gigabytes(model.download_size)} to fetch")
    for repo, license_name in dict.fromkeys((s.repo, s.license) for s in model.sources):
        say(f"  licence of {repo}: {license_name}")


def _write_descriptions(model: ManifestModel, staging: Path, lora_scale: float) -> None:
    details = _details(model, lora_scale)
    descriptions: dict[str, Mapping[str, Any]] = dict(model.generated)
    if model.card is not None:
        descriptions[CARD_FILE] = details["card"]
    for target, content in descriptions.items():
        (staging / target).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_record(staging, details)


def _details(model: ManifestModel, lora_scale: float) -> dict[str, Any]:
    """What an installed model was made of, and how."""
    merged = {"lora_scale": lora_scale} if model.lora_modules else {}
    card = {"card": {**model.card, **merged}} if model.card is not None else {}
    own = {"own": model.own} if model.own is not None else {}
    recorded = ("repo", "revision", "path", "sha256", "license")
    sources = [{key: getattr(source, key) for key in recorded} for source in model.sources]
    return {"model": model.name, **merged, **card, **own, "sources": sources}


def _advice(name: str, error: Exception, is_entry: bool) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        error = DownloadError(
            "the disk is full. Free some space, or set DMD2_WEIGHTS_DIR to a larger disk"
        )
    command = f"`scripts/download-weights {name}`" if is_entry else "The same command"
    return f"{name} was not installed: {error}. {command} goes on where this stopped"
