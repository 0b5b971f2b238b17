"""The user's own weights: what the texts mean that name them, here or on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dmd2.errors import DownloadError, LoraError
from dmd2.loras.names import MODEL_PARTS
from dmd2.loras.remotes import listed
from dmd2.loras.sources import SUFFIX, HubFile, parse
from dmd2.model_card import read_json
from dmd2.store.hub import OnHub
from dmd2.store.kinds import UNKNOWN_LICENSE, Header, check_configs, check_kind, warnings_of
from dmd2.store.manifest import SourceFile, sha256_of

# The configs of a folder that tell what kind of model it is.
_CONFIGS = ("unet/config.json", "scheduler/scheduler_config.json")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?P<fp16>\.fp16)?(?P<shard>-\d{5}-of-\d{5})?"
    r"(?P<fp16_last>\.fp16)?\.safetensors"
)


@dataclass(frozen=True)
class BaseFiles:
    """A checkpoint that takes the place of the one that the manifest has.

    Attributes:
        name: what a model that is made with it is called, where nothing else is said.
        convert: how it is read: a key of dmd2.store.convert.READERS.
        parts: the files of each part of the model; of a single file, all have the same.
    """

    name: str
    convert: str
    parts: Mapping[str, Sequence[SourceFile]]

    @property
    def sha256(self) -> dict[str, str | None]:
        """The hash of each file, by its path."""
        return {source.path: source.sha256 for of_part in self.parts.values() for source in of_part}


def find_base(text: str, say: Callable[[str], None]) -> BaseFiles:
    """The checkpoint that a user means, looked at before anything large is fetched.

    Args:
        text: the path of a safetensors file or of a folder in diffusers' layout, or OWNER/REPO or
            OWNER/REPO/FILE on the hub, either with @REVISION.
        say: takes warnings.

    Raises:
        DownloadError: there is no such thing, or it is none that DMD2 can be merged into.
    """
    place = _place("--base", text)
    if place.file is None and any(path.startswith("unet/") for path in place.files):
        base = _folder(text, place)
        looked_at = base.parts["unet"][0].path
        header = place.header(looked_at)
    else:
        looked_at = _file("--base", text, place)
        header = place.header(looked_at)
        check_kind(looked_at, header)
        source = place.source(looked_at)
        base = BaseFiles(_stem(looked_at), "single-file", {part: [source] for part in MODEL_PARTS})
    for warning in warnings_of(f"{place.name}/{looked_at}", header):
        say(f"warning: {warning}")
    return base


def find_lora(text: str) -> SourceFile:
    """The LoRA that a user means: the path of a file, or one on the hub, as find_base has it.

    Raises:
        DownloadError: there is no such file, or it is no safetensors file.
    """
    place = _place("--lora", text)
    path = _file("--lora", text, place)
    place.header(path)
    return place.source(path)


class _Here:
    """A file or a folder of this machine, as OnHub is a repository."""

    def __init__(self, path: Path) -> None:
        self.file = path.name if path.is_file() else None
        self.name, self._root = path.resolve().name, path.parent if path.is_file() else path
        found = (each for pattern in ("*", "*/*") for each in self._root.glob(pattern + SUFFIX))
        self.files = [self.file] if self.file else sorted(map(self._relative, found))

    def source(self, path: str) -> SourceFile:
        file = self._root / path
        license_name = self.header(path).metadata.get("modelspec.license", UNKNOWN_LICENSE)
        return SourceFile(
            repo=self.name,
            revision="",
            path=path,
            size=file.stat().st_size,
            is_exact_size=True,
            sha256=sha256_of(file),
            license=license_name,
            local=file,
        )

    def header(self, path: str) -> Header:
        return Header.read(self._root / path)

    def config(self, path: str) -> dict[str, Any]:
        return read_json(self._root / path)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def _place(field: str, text: str) -> _Here | OnHub:
    if Path(text).exists():
        return _Here(Path(text))
    try:
        reference = parse(text)
    except LoraError:
        reference = None
    is_path = text.startswith((".", "/", "~")) or (text.endswith(SUFFIX) and text.count("/") < 2)
    if is_path or not isinstance(reference, HubFile):
        raise DownloadError(
            f"{field} {text!r}: there is no such file or folder here, and on the Hugging Face hub "
            "one is called OWNER/REPO or OWNER/REPO/FILE.safetensors, either with @REVISION"
        )
    return OnHub(reference)


def _file(field: str, text: str, place: _Here | OnHub) -> str:
    """The one safetensors file that is meant."""
    there = [path for path in place.files if path.endswith(SUFFIX) and "/" not in path]
    if place.file is None and len(there) == 1:
        return there[0]
    if place.file is None:
        raise DownloadError(f"{field} {text!r} has {listed(there)}: name one file, as {text}/FILE")
    if place.file not in place.files:
        raise DownloadError(f"{field} {text!r}: there is no such file; there are {listed(there)}")
    return place.file


def _folder(text: str, place: _Here | OnHub) -> BaseFiles:
    check_configs(text, *(place.config(path) for path in _CONFIGS))
    parts = {
        part: [place.source(path) for path in _weights(text, place, part)] for part in MODEL_PARTS
    }
    return BaseFiles(place.name, "folder", parts)


def _weights(text: str, place: _Here | OnHub, part: str) -> list[str]:
    """A part's file or shards: in float16 where there are such, which is all that is kept."""
    found: dict[tuple[bool, bool], list[str]] = {}
    for path in place.files:
        folder, _, name = path.rpartition("/")
        if folder == part and (match := _WEIGHTS.fullmatch(name)):
            is_full = not (match["fp16"] or match["fp16_last"])
            found.setdefault((is_full, match["shard"] is not None), []).append(path)
    if not found:
        raise DownloadError(f"--base {text!r} has no safetensors weights in {part}/")
    return found[min(found)]


def _stem(path: str) -> str:
    return PurePosixPath(path).name.removesuffix(SUFFIX)
