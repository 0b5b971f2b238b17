"""Where models are: the manifest, installed folders, and whether they are whole. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd2.errors import ModelError
from dmd2.model_card import CARD_FILE, read_json
from dmd2.settings import ROOT

MANIFEST = ROOT / "weights" / "manifest.json"
RECORD_FILE = "installed.json"


@dataclass(frozen=True)
class SourceFile:
    """One file of a hub repository, pinned, or one that lies here already.

    Attributes:
        repo: owner/name on the hub; of files that lie here, what they are called together.
        revision: the commit, 40 hexadecimal digits; "" for a file that lies here.
        path: the file inside the repository.
        size: bytes; where is_exact_size is false, an estimate.
        sha256: of the content; None where nobody has recorded it, so that it cannot be installed.
        license: the licence's name and where it stands.
        local: where it lies, if this repository ships it or it is the user's own; None for one of
            the hub.
    """

    repo: str
    revision: str
    path: str
    size: int
    is_exact_size: bool
    sha256: str | None
    license: str
    local: Path | None = None


@dataclass(frozen=True)
class InstallFile:
    """A file of a model folder, and what it is made of.

    Attributes:
        target: the path inside the model folder.
        source: the file that it comes from.
        convert: None (as it is), or how float16 safetensors are made of it: a key of
            dmd2.store.convert.READERS.
        lora: the kohya LoRA file that is merged in; None for none.
        shards: further files, which hold the rest of the tensors.
        size: bytes of the target; those of source where that is None.
        installed: the same file, made before, in another installed folder; None for none.
    """

    target: str
    source: SourceFile
    convert: str | None = None
    lora: SourceFile | None = None
    shards: tuple[SourceFile, ...] = ()
    size: int | None = None
    installed: Path | None = None

    @property
    def sources(self) -> list[SourceFile]:
        """Every file that this one is made of."""
        return [self.source, *self.shards, *([] if self.lora is None else [self.lora])]

    @property
    def is_made(self) -> bool:
        """Whether its weights are converted, and not another file's as they are."""
        return self.convert is not None and self.installed is None

    @property
    def part(self) -> str:
        """The part of the model whose folder it lies in."""
        return self.target.partition("/")[0]


@dataclass(frozen=True)
class ManifestModel:
    """What an entry of the manifest installs.

    Attributes:
        name: the entry, and the folder under weights/.
        kind: "model" (a model folder) or "component" (a part that a model may use).
        card: dmd2.json's content; None for a component.
        files: what is fetched or made.
        generated: small JSON files that are written as they stand, by target.
        lora_modules: how many modules a LoRA must reach; 0 without one.
        loras: the user's own, merged in beside that one, each with its strength.
        own: for the record, what of the user's own is in it, and how; None for an entry as it is.
    """

    name: str
    kind: str
    card: Mapping[str, Any] | None
    files: tuple[InstallFile, ...]
    generated: Mapping[str, Mapping[str, Any]]
    lora_modules: int
    loras: tuple[tuple[SourceFile, float], ...] = ()
    own: Mapping[str, Any] | None = None

    @property
    def sources(self) -> list[SourceFile]:
        """Every file that it is made of, each once."""
        return self._sources_of(self.files)

    @property
    def needed(self) -> list[SourceFile]:
        """Those of sources that must be there for what is not installed already."""
        return self._sources_of(file for file in self.files if file.installed is None)

    @property
    def download_size(self) -> int:
        """Bytes to fetch in all; 0 where every file is shipped."""
        return sum(source.size for source in self.needed if source.local is None)

    def _sources_of(self, files: Iterable[InstallFile]) -> list[SourceFile]:
        of_files = (source for file in files for source in file.sources)
        return list(dict.fromkeys([*of_files, *(source for source, _ in self.loras)]))


@dataclass(frozen=True)
class Manifest:
    """weights/manifest.json, checked: the models, and the files that are known to be broken.

    Attributes:
        models: by name.
        refused: sha256 to the reason.
    """

    models: Mapping[str, ManifestModel]
    refused: Mapping[str, str]

    @classmethod
    def read(cls, path: Path = MANIFEST) -> Manifest:
        """The manifest in a file; the files that are shipped lie in folders beside it."""
        said = read_json(path)
        sources = {
            f"{key}/{file}": SourceFile(
                repo=repository["repo"],
                revision=repository.get("revision", ""),
                path=file,
                size=facts.get("size") or facts["estimated_size"],
                is_exact_size="size" in facts,
                sha256=facts["sha256"],
                license=repository["license"],
                local=path.parent / repository["bundled"] / file
                if "bundled" in repository
                else None,
            )
            for key, repository in said["repositories"].items()
            for file, facts in repository["files"].items()
        }
        models = {name: _model(name, entry, sources) for name, entry in said["models"].items()}
        return cls(models, said["refused"])


def quick_problems(folder: Path) -> list[str]:
    """What is wrong with an installed folder by its files' names and sizes alone."""
    if not folder.is_dir():
        return ["there is no such folder"]
    if not (folder / RECORD_FILE).is_file():
        return [f"it has no {RECORD_FILE}, so it was not installed whole"]
    try:
        recorded = read_json(folder / RECORD_FILE)["files"]
    except (ModelError, KeyError) as error:
        return [f"{RECORD_FILE} is damaged: {error}"]
    problems = []
    for target, facts in recorded.items():
        path = folder / target
        if not path.is_file():
            problems.append(f"{target} is missing")
        elif path.stat().st_size != facts["size"]:
            problems.append(f"{target} has {path.stat().st_size} bytes, not {facts['size']}")
    return problems


def verify(model: ManifestModel | None, folder: Path) -> list[str]:
    """Everything that is wrong with an installed folder, its files' hashes included.

    Files that were taken as they are must have the manifest's sha256; files that were made
    here must have the one that was recorded when they were made, and so must all of a model that
    is none of the manifest's.
    """
    problems = quick_problems(folder)
    if problems:
        return problems
    recorded = read_json(folder / RECORD_FILE)["files"]
    expected = {target: facts["sha256"] for target, facts in recorded.items()}
    wanted = set() if model is None else _targets(model)
    for file in () if model is None else model.files:
        sha256 = file.source.sha256
        if file.target in recorded and file.convert is None and sha256 is not None:
            expected[file.target] = sha256
    problems = [f"{target} is not in the record" for target in sorted(wanted - set(recorded))]
    for target, sha256 in expected.items():
        found = sha256_of(folder / target)
        if found != sha256:
            problems.append(f"{target} has sha256 {found}, not {sha256}")
    return problems


def _targets(model: ManifestModel) -> set[str]:
    targets = {file.target for file in model.files} | set(model.generated)
    return targets if model.card is None else targets | {CARD_FILE}


def write_record(folder: Path, details: Mapping[str, Any]) -> None:
    """Record every file of a finished folder, so that it can be told from a half-made one."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = json.dumps({**details, "files": files}, indent=2)
    (folder / RECORD_FILE).write_text(record + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def gigabytes(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _model(name: str, entry: Mapping[str, Any], sources: Mapping[str, SourceFile]) -> ManifestModel:
    files = []
    for target, made_of in entry["files"].items():
        made_of = {"from": made_of} if isinstance(made_of, str) else made_of
        files.append(
            InstallFile(
                target=target,
                source=sources[made_of["from"]],
                convert=made_of.get("convert"),
                lora=sources[made_of["lora"]] if "lora" in made_of else None,
            )
        )
    return ManifestModel(
        name=name,
        kind=entry["kind"],
        card=entry.get("card"),
        files=tuple(files),
        generated=entry.get("generated", {}),
        lora_modules=entry.get("lora_modules", 0),
    )
