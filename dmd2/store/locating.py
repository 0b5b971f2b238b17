"""Where the models that settings name lie, and which command installs what is missing. No torch."""

from __future__ import annotations

from pathlib import Path

from dmd2.errors import MissingWeightsError, ModelError
from dmd2.model_card import ModelCard
from dmd2.store.manifest import RECORD_FILE, Manifest, gigabytes, quick_problems


def locate(model: str, weights_dir: Path, manifest: Manifest | None = None) -> Path:
    """The folder of a model, given by its manifest entry or by its own path.

    Raises:
        MissingWeightsError: a known model that is not installed; the text has the command that
            installs it and its size.
        ModelError: neither an entry nor a folder, or a folder that was damaged.
    """
    manifest = manifest or Manifest.read()
    if model not in manifest.models:
        folder = Path(model)
        if (folder / "model_index.json").is_file():
            return folder
        return _locate_own(model, weights_dir, manifest)
    entry, folder = manifest.models[model], weights_dir / model
    if entry.kind != "model":
        raise ModelError(f"DMD2_MODEL={model!r} is a {entry.kind}, which cannot run alone")
    problems = quick_problems(folder)
    if problems:
        raise MissingWeightsError(
            f"the weights of {model} are not installed in {folder} ({problems[0]}). Run "
            f"`scripts/download-weights {model}` (about {gigabytes(entry.download_size)} to "
            "fetch), or set DMD2_DOWNLOAD=1 to let setup do it"
        )
    return folder


def _locate_own(model: str, weights_dir: Path, manifest: Manifest) -> Path:
    """The folder of a model that was made with the user's own weights, by its name."""
    folder = weights_dir / model
    if "/" in model or not (folder / RECORD_FILE).is_file():
        raise ModelError(
            f"DMD2_MODEL={model!r} is neither an entry of weights/manifest.json "
            f"({', '.join(manifest.models)}), nor a model of your own in {weights_dir}, nor a "
            "folder with a model_index.json"
        )
    if problems := quick_problems(folder):
        raise MissingWeightsError(
            f"{folder} is damaged ({problems[0]}): delete it, and install it again as you did"
        )
    return folder


def locate_safety_checker(card: ModelCard, weights_dir: Path) -> Path | None:
    """Where a model's safety checker is installed; None where the model needs none.

    Raises:
        MissingWeightsError: it is not installed; the text has the command that installs it.
    """
    if card.safety_checker is None:
        return None
    folder = weights_dir / card.safety_checker
    problems = quick_problems(folder)
    if problems:
        raise MissingWeightsError(
            f"the safety checker {card.safety_checker} is not installed in {folder} "
            f"({problems[0]}). Run `scripts/download-weights {card.safety_checker}`, or set "
            "DMD2_SAFETY=off to run without it"
        )
    return folder
