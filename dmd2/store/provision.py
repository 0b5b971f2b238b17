"""What a server of a model needs under weights/: the model, and its safety checker."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dmd2.errors import ReadOnlyWeightsError
from dmd2.model_card import SAFETY_CHECKER
from dmd2.store.install import install, install_model, to_stderr
from dmd2.store.locating import locate
from dmd2.store.manifest import Manifest, ManifestModel

if TYPE_CHECKING:
    from dmd2.store.derived import OwnWeights


def is_shipped(name: str, manifest: Manifest) -> bool:
    """Whether an entry is made of files that this repository brings along."""
    entry = manifest.models.get(name)
    return entry is not None and entry.download_size == 0


def provide(
    name: str,
    weights_dir: Path,
    manifest: Manifest,
    *,
    lora_scale: float = 1.0,
    check_safety: bool = True,
) -> None:
    """Install an entry of the manifest, and the safety checker that its card asks for.

    Raises:
        DownloadError: as dmd2.store.install.install.
    """
    install(name, weights_dir, lora_scale=lora_scale, manifest=manifest)
    if check_safety:
        _provide_safety(manifest.models[name], weights_dir, manifest)


def provide_own(
    name: str,
    own: OwnWeights,
    weights_dir: Path,
    manifest: Manifest,
    *,
    lora_scale: float = 1.0,
    check_safety: bool = True,
) -> Path:
    """Install an entry of the manifest with the user's own weights in it, and its safety checker.

    Returns:
        The new model's folder.

    Raises:
        DownloadError: as dmd2.store.derived.derive and dmd2.store.install.install_model.
    """
    from dmd2.store.derived import derive

    model = derive(manifest.models[name], own, weights_dir, manifest, lora_scale, to_stderr)
    folder = install_model(model, weights_dir, lora_scale, manifest, to_stderr)
    if check_safety:
        _provide_safety(model, weights_dir, manifest)
    return folder


def _provide_safety(model: ManifestModel, weights_dir: Path, manifest: Manifest) -> None:
    if model.card is not None:
        checker = model.card.get("safety_checker", SAFETY_CHECKER)
        if checker is not None:
            install(checker, weights_dir, manifest=manifest)


@contextmanager
def provided(
    name: str,
    weights_dir: Path,
    manifest: Manifest,
    *,
    download: bool = False,
    lora_scale: float = 1.0,
    check_safety: bool = True,
) -> Iterator[Path]:
    """The folder of a model, by its entry or its path, for as long as it is being loaded.

    What is made of shipped files alone is made without being asked, in a private temporary folder
    where weights_dir takes nothing. Anything else is fetched only with download.

    Raises:
        DownloadError: as dmd2.store.install.install.
        MissingWeightsError, ModelError: as dmd2.store.locating.locate.
    """
    if is_shipped(name, manifest):
        try:
            install(name, weights_dir, lora_scale=lora_scale, manifest=manifest)
        except ReadOnlyWeightsError:
            with tempfile.TemporaryDirectory(prefix="dmd2-model-") as folder:
                yield install(name, Path(folder), lora_scale=lora_scale, manifest=manifest)
            return
    elif download and name in manifest.models:
        provide(name, weights_dir, manifest, lora_scale=lora_scale, check_safety=check_safety)
    yield locate(name, weights_dir, manifest)
