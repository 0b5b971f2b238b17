"""What a user writes for a LoRA, taken apart: a file here, on the hub, on Civitai, at a URL."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from dmd2.errors import LoraError
from dmd2.settings import LoraSource

SUFFIX = ".safetensors"
MAX_CHARS = 2000
HUB, CIVITAI = "huggingface.co", "civitai.com"
_HUB_HOSTS = (HUB, "www.huggingface.co", "hf.co")
# civitai.com has what is safe for work alone, and civitai.red all; ids are the same.
_CIVITAI_HOSTS = {CIVITAI: CIVITAI, "www.civitai.com": CIVITAI, "civitai.red": "civitai.red"}

_FILE = r"[^/\\@]+(?:/[^/\\@]+)*\.safetensors"
_REPO = r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)"
_HUB_NAME = re.compile(
    rf"{_REPO}(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>{_FILE}))?(?:@(?P<last>[\w./-]+))?", re.ASCII
)
_HUB_PATH = re.compile(
    rf"/{_REPO}(?:/(?:resolve|blob|tree)/(?P<revision>[^/]+)(?:/(?P<file>{_FILE}))?)?/?", re.ASCII
)
_ID = re.compile(r"[0-9]{1,12}")
_CIVITAI_NAME = re.compile(
    r"(?:civitai|urn:air:sdxl:(?:lora|locon|lycoris|dora):civitai)"
    r":(?P<model>\d{1,12})@(?P<version>\d{1,12})",
    re.ASCII,
)
_CIVITAI_PATH = re.compile(
    r"/(?:models/(?P<model>\d{1,12})(?:/[^/]*)?|api/download/models/(?P<version>\d{1,12}))",
    re.ASCII,
)
_FORMS = (
    "Write a file's name, owner/repo, owner/repo/file.safetensors, owner/repo@revision, "
    "civitai:model@version, or an https URL that ends in .safetensors"
)


@dataclass(frozen=True)
class LocalFile:
    """A file of the operator's folder, by its name in it."""

    source: ClassVar[LoraSource] = "local"
    name: str


@dataclass(frozen=True)
class HubFile:
    """A file of a repository of the Hugging Face hub.

    Attributes:
        repo: owner/name.
        revision: a branch, a tag or a commit.
        file: its path inside; None for the only safetensors file that is there.
    """

    source: ClassVar[LoraSource] = "huggingface"
    repo: str
    revision: str = "main"
    file: str | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether it names a commit and a file, so that its content cannot change."""
        return self.file is not None and bool(re.fullmatch(r"[0-9a-f]{40}", self.revision))


@dataclass(frozen=True)
class CivitaiFile:
    """A file of a version of a model on Civitai.

    Attributes:
        version: its id, which is no model's.
        model: the model's id, where it was given.
        file: the file's id, where it was given; None for the version's primary one.
        host: that serves it.
    """

    source: ClassVar[LoraSource] = "civitai"
    version: int
    model: int | None = None
    file: int | None = None
    host: str = CIVITAI


@dataclass(frozen=True)
class WebFile:
    """A file at an https URL, whose query may hold credentials."""

    source: ClassVar[LoraSource] = "https"
    url: str = field(repr=False)


Reference = LocalFile | HubFile | CivitaiFile | WebFile


def parse(text: str) -> Reference:
    """What a text refers to; nothing is looked up.

    Raises:
        LoraError: it has none of the forms, or a form that lacks something.
    """
    if len(text) > MAX_CHARS:
        raise LoraError(f"it has {len(text)} characters, and may have {MAX_CHARS}", _FORMS)
    if "://" in text:
        return _of_url(text)
    if found := _CIVITAI_NAME.fullmatch(text):
        return CivitaiFile(int(found["version"]), int(found["model"]))
    if found := _HUB_NAME.fullmatch(text):
        if found["revision"] and found["last"]:
            raise LoraError("it names two revisions", "Name one")
        return _of_hub(found["repo"], found["revision"] or found["last"], found["file"])
    if text.endswith(SUFFIX) and not re.search(r"^\.|[/\\\0]", text):
        return LocalFile(text)
    raise LoraError("it has none of the forms of a LoRA", _FORMS)


def check_allowed(reference: Reference, allowed: Collection[LoraSource]) -> None:
    """Refuse, as a LoraError, what is from none of the sources that the operator allows."""
    if reference.source not in allowed:
        raise LoraError(
            f"it is from {reference.source}, and this server takes LoRAs from {', '.join(allowed)}",
            "Use one from there, or have the operator add it to DMD2_LORA_SOURCES",
        )


def without_secrets(text: str) -> str:
    """A reference as a message may show it: a URL's user, query and fragment are left out.

    So is what looks like a user and a password in what is hardly a URL.
    """
    shown = re.sub(r"//[^/]*@", "//", re.split(r"[?#]", text, maxsplit=1)[0])
    if shown.lower().startswith(("civitai:", "urn:")):  # whose versions stand behind an @
        return shown
    return re.sub(r"^(https?:/*)?[^/]*:[^/]*@", r"\1", shown)


def _of_url(text: str) -> Reference:
    if re.search(r"[\x00-\x20\x7f\\]", text):
        raise LoraError("a URL may hold no space, backslash or control character", "Escape it")
    try:
        url = urlsplit(text)
    except ValueError as error:
        raise LoraError("it is not a URL", _FORMS) from error
    if url.scheme != "https":
        raise LoraError("a URL must begin with https://", "Use one that does")
    if url.hostname in _HUB_HOSTS:
        if found := _HUB_PATH.fullmatch(url.path):
            return _of_hub(found["repo"], *(each and unquote(each) for each in found.group(2, 3)))
        raise LoraError("this URL of the hub names no safetensors file", _FORMS)
    if url.hostname in _CIVITAI_HOSTS:
        return _of_civitai(url, _CIVITAI_HOSTS[url.hostname])
    if not url.path.endswith(SUFFIX):
        raise LoraError(f"a URL must end in {SUFFIX}, before any query", "Link to such a file")
    return WebFile(text.partition("#")[0])


def _of_hub(repo: str, revision: str | None, file: str | None) -> HubFile:
    names = (repo, revision or "", file or "")
    if any(part in (".", "..") for name in names for part in name.split("/")):
        raise LoraError("it holds a folder named . or ..", "Write the path without")
    return HubFile(repo, revision or "main", file)


def _of_civitai(url: SplitResult, host: str) -> CivitaiFile:
    query = parse_qs(url.query)
    if "token" in query:
        raise LoraError("a token has no place in it", "Give it as civitai_api_token")
    found = _CIVITAI_PATH.fullmatch(url.path)
    version = (found and found["version"]) or "".join(query.get("modelVersionId", []))
    file = "".join(query.get("fileId", []))
    if found is None or not _ID.fullmatch(version) or (file and not _ID.fullmatch(file)):
        raise LoraError(
            "this URL of Civitai names no version of a model",
            "Write civitai:model@version, or end it in ?modelVersionId= and the version's number",
        )
    model = found["model"]
    return CivitaiFile(int(version), int(model) if model else None, int(file or 0) or None, host)
