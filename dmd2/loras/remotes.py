"""Where a reference's file lies, by the APIs of the hub and of Civitai, and why it is not had."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from dmd2.errors import LoraError
from dmd2.loras.public_fetch import Answer, PublicFetch
from dmd2.loras.sources import HUB, SUFFIX, CivitaiFile, HubFile, WebFile
from dmd2.settings import LoraSource

# The input that holds a source's token, and what a token may lack.
_TOKENS: dict[LoraSource, tuple[str, str]] = {
    "huggingface": ("hf_api_token", "accept the repository's terms, or let it read the repository"),
    "civitai": ("civitai_api_token", "early access is for those who bought it"),
}
_CIVITAI_TYPES = ("LORA", "LoCon", "DoRA")
_MAX_API_BYTES = 16_000_000
_MAX_LISTED = 20
_OTHER_SOURCE = "Use another source"
_LATER = "Try again later"
_MISSING = (
    "See that it is written right; what is on civitai.red and not on civitai.com needs its URL"
)


@dataclass(frozen=True)
class Download:
    """A remote file.

    Attributes:
        key: what it is called in the cache's index.
        url: where it lies; its query may hold credentials.
        name: what logs and metadata call it.
        sha256: of its content, where its source says it.
        is_fixed: whether the content under the key stays what it is, as far as sha256 tells.
    """

    key: str = field(repr=False)
    url: str = field(repr=False)
    name: str
    sha256: str | None
    is_fixed: bool


@dataclass(frozen=True)
class Remote:
    """A source as one request may use it.

    Attributes:
        client: of the network.
        source: its name.
        token: that it wants; None for none.
        cancelled: ends whatever is under way.
    """

    client: PublicFetch
    source: LoraSource
    token: str | None = field(repr=False)
    cancelled: threading.Event

    def get(self, url: str, max_bytes: int, etag: str = "") -> Answer:
        """The answer that has the file at a URL, or, with status 304, still has that of the etag.

        Raises:
            LoraError: it has not; with the way in.
            CancelledError: the request is.
        """
        answer = self.client.get(
            url, max_bytes=max_bytes, cancelled=self.cancelled, token=self.token, etag=etag
        )
        # Civitai sends a page for logging in where it is not told who asks.
        is_page = answer.status == 200 and answer.header("Content-Type").startswith("text/html")
        if (answer.status == 200 and not is_page) or (etag and answer.status == 304):
            return answer
        answer.close()
        said = "with a web page" if is_page else str(answer.status)
        remedy = {200: self._way_in(), 401: self._way_in(), 403: self._way_in(), 404: _MISSING}
        raise LoraError(f"{answer.host} answered {said}", remedy.get(answer.status, _LATER))

    def ask(self, url: str) -> Any:
        """The JSON that an API has at a URL."""
        with self.get(url, _MAX_API_BYTES) as answer:
            try:
                return json.loads(b"".join(answer.chunks()))
            except (ValueError, RecursionError):
                raise LoraError(f"{answer.host} does not answer JSON", _LATER) from None

    def _way_in(self) -> str:
        name, lack = _TOKENS.get(self.source, (None, None))
        if name is None:
            return "Link to the file itself, where it needs no login"
        if self.token is None:
            return f"If it exists, it needs a login: give {name}"
        return f"The {name} that was given lacks access: {lack}"


def locate(reference: HubFile | CivitaiFile | WebFile, ask: Callable[[str], Any]) -> Download:
    """The file of a reference; ask gives the JSON that an API has at a URL.

    Raises:
        LoraError: there is none, more than one, or none that may be used.
    """
    try:
        match reference:
            case HubFile():
                return _on_hub(reference, ask)
            case CivitaiFile():
                return _on_civitai(reference, ask)
            case WebFile(url):
                return Download(url, url, name_of(unquote(urlsplit(url).path)), None, False)
    except (AttributeError, KeyError, TypeError, ValueError):
        limit = f"the API of {reference.source} answers what it never did"
        raise LoraError(limit, _OTHER_SOURCE) from None


def of_commit(repo: str, commit: str, file: str, sha256: str | None) -> Download:
    """A file of the hub at a commit."""
    url = f"https://{HUB}/{repo}/resolve/{commit}/{quote(file)}"
    return Download(url, url, name_of(file), sha256, is_fixed=True)


def name_of(path: str) -> str:
    """A file's stem, without what could be taken for something else in a line of text."""
    stem = path.rpartition("/")[2].removesuffix(SUFFIX)
    return re.sub(r"[^\w.+() -]", "_", stem).strip()[:100] or "lora"


def listed(names: Collection[str]) -> str:
    """File names as a message may show them."""
    shown = [ascii(name)[1:-1][:100] for name in sorted(names)[:_MAX_LISTED]]
    more = len(names) - len(shown)
    return (", ".join(shown) or "none") + (f" and {more} more" if more else "")


def _on_hub(reference: HubFile, ask: Callable[[str], Any]) -> Download:
    repo, revision = reference.repo, quote(reference.revision, safe="")
    found = ask(f"https://{HUB}/api/models/{repo}/revision/{revision}?blobs=true")
    files = {each["rfilename"]: each.get("lfs") or {} for each in found["siblings"]}
    files = {name: lfs for name, lfs in files.items() if name.endswith(SUFFIX)}
    if reference.file is None and len(files) > 1:
        raise LoraError(
            f"{repo} has several files: {listed(files)}", f"Write {repo}/ and the name of one"
        )
    file = reference.file or "".join(files)
    if file not in files:
        raise LoraError(
            f"{repo} has no such {SUFFIX} file; it has {listed(files)}",
            "Write the name of one that is there, or use another repository",
        )
    sha256 = files[file].get("sha256")  # only a large file has one
    if sha256 is not None:
        _matching(r"[0-9a-f]{64}", sha256)
    return of_commit(repo, _matching(r"[0-9a-f]{40}", found["sha"]), file, sha256)


def _on_civitai(reference: CivitaiFile, ask: Callable[[str], Any]) -> Download:
    version = f"{reference.host}/api/v1/model-versions/{reference.version}"
    found = ask(f"https://{version}")
    if reference.model not in (None, found["modelId"]):
        raise LoraError(
            f"version {reference.version} is not one of model {reference.model}",
            "Write civitai:model@version with the two numbers of the same page",
        )
    if found["model"]["type"] not in _CIVITAI_TYPES:
        raise LoraError(f"it is a {listed([found['model']['type']])}, not a LoRA", "Use a LoRA")
    files = [each for each in found["files"] if each["type"] == "Model"]
    if reference.file is not None:
        files = [each for each in files if each["id"] == reference.file]
    safe = [each for each in files if each["metadata"].get("format") == "SafeTensor"]
    if not safe:
        formats = {str(each["metadata"].get("format")) for each in files}
        raise LoraError(
            f"it has no safetensors file; its formats: {listed(formats)}",
            "Use another version; pickles are never read",
        )
    file = next((each for each in safe if each.get("primary")), safe[0])
    sha256 = _matching(r"[0-9a-f]{64}", file["hashes"]["SHA256"].lower())
    # With the file's id: the version's own link may be answered with 404.
    url = f"https://{reference.host}/api/download/models/{reference.version}?fileId={file['id']:d}"
    return Download(url, url, name_of(file["name"]), sha256, is_fixed=True)


def _matching(pattern: str, text: str) -> str:
    if not re.fullmatch(pattern, text):
        raise TypeError
    return text
