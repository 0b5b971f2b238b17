"""A repository of the Hugging Face hub that a user names: what is in it, at one commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from dmd2.errors import DownloadError
from dmd2.loras.sources import HubFile
from dmd2.store.kinds import UNKNOWN_LICENSE, Header
from dmd2.store.manifest import SourceFile


class OnHub:
    """The files of a repository, of which none but the first bytes are read here.

    Attributes:
        name: the repository's, without its owner's.
        file: the file that was asked for by its path; None where the repository was.
        files: the paths of all.

    Raises:
        DownloadError: there is no such repository or file, or the hub cannot be asked.
    """

    def __init__(self, reference: HubFile) -> None:
        from huggingface_hub import HfApi

        self.file, self._repo, self._api = reference.file, reference.repo, HfApi()
        with self._explained(reference.revision):
            info = self._api.model_info(
                reference.repo, revision=reference.revision, files_metadata=True
            )
        self._commit, self._license = str(info.sha), _license_of(info)
        self._facts = {each.rfilename: each for each in info.siblings or () if _is_plain(each)}
        self.name, self.files = reference.repo.rpartition("/")[2], sorted(self._facts)

    def source(self, path: str) -> SourceFile:
        """A file, pinned to its commit and its sha256."""
        facts = self._facts[path]
        if facts.lfs is None or facts.size is None:
            raise DownloadError(
                f"{self._repo}/{path}: the hub tells no sha256 of it, so that nobody could say "
                "whether it came whole. Fetch it yourself, and give the file"
            )
        return SourceFile(
            repo=self._repo,
            revision=self._commit,
            path=path,
            size=facts.size,
            is_exact_size=True,
            sha256=facts.lfs.sha256,
            license=self._license,
        )

    def header(self, path: str) -> Header:
        """The header of a safetensors file."""
        with self._explained(path):
            said = self._api.parse_safetensors_file_metadata(
                self._repo, path, revision=self._commit
            )
        return Header(
            {key: tuple(each.shape) for key, each in said.tensors.items()},
            {key: str(each.dtype) for key, each in said.tensors.items()},
            said.metadata,
        )

    def config(self, path: str) -> dict[str, Any]:
        """A small JSON file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        with self._explained(path):
            url = hf_hub_url(self._repo, path, revision=self._commit)
            answer = get_session().get(url, headers=build_hf_headers(), follow_redirects=True)
            hf_raise_for_status(answer)
            return dict(answer.json())

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the client's many kinds: network, hub, what it answers
            raise DownloadError(
                f"{self._repo} ({what}) could not be read from the hub: "
                f"{' '.join(str(error).split())[:300]}. See that it is written right; what is not "
                "open to all needs HF_TOKEN"
            ) from error


def _is_plain(facts: Any) -> bool:
    path = PurePosixPath(facts.rfilename)
    return not path.is_absolute() and ".." not in path.parts


def _license_of(info: Any) -> str:
    card = info.card_data.to_dict() if info.card_data is not None else {}
    name = card.get("license")
    if name == "other":
        name = card.get("license_name", "other")
    return f"{name} (its page on the hub)" if name else UNKNOWN_LICENSE
