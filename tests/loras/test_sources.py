"""What users write for a LoRA."""

from __future__ import annotations

import pytest

from dmd2.errors import LoraError
from dmd2.loras.sources import (
    CivitaiFile,
    HubFile,
    LocalFile,
    Reference,
    WebFile,
    check_allowed,
    parse,
    without_secrets,
)
from dmd2.settings import LORA_SOURCES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
URL = "https://files.test/a/b.safetensors"


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("my lora v1.2.safetensors", LocalFile("my lora v1.2.safetensors")),
        ("owner/repo", HubFile("owner/repo")),
        ("o-w_n/r.e", HubFile("o-w_n/r.e")),
        ("owner/repo/f.safetensors", HubFile("owner/repo", "main", "f.safetensors")),
        ("owner/repo/a b/f.safetensors", HubFile("owner/repo", "main", "a b/f.safetensors")),
        ("owner/repo@v1.0", HubFile("owner/repo", "v1.0")),
        ("owner/repo@refs/pr/1", HubFile("owner/repo", "refs/pr/1")),
        ("owner/repo@v1/f.safetensors", HubFile("owner/repo", "v1", "f.safetensors")),
        ("owner/repo/f.safetensors@a/b", HubFile("owner/repo", "a/b", "f.safetensors")),
        ("https://huggingface.co/owner/repo", HubFile("owner/repo")),
        ("https://hf.co/owner/repo/tree/v1", HubFile("owner/repo", "v1")),
        (
            f"https://huggingface.co/owner/repo/resolve/{COMMIT}/f.safetensors?download=true",
            HubFile("owner/repo", COMMIT, "f.safetensors"),
        ),
        (
            "https://huggingface.co/owner/repo/blob/refs%2Fpr%2F1/a/f%20g.safetensors",
            HubFile("owner/repo", "refs/pr/1", "a/f g.safetensors"),
        ),
        ("civitai:12@34", CivitaiFile(34, 12)),
        ("urn:air:sdxl:lora:civitai:12@34", CivitaiFile(34, 12)),
        ("https://civitai.com/models/12?modelVersionId=34", CivitaiFile(34, 12)),
        (
            "https://civitai.red/models/12/a-name?modelVersionId=34",
            CivitaiFile(34, 12, host="civitai.red"),
        ),
        ("https://www.civitai.com/api/download/models/34", CivitaiFile(34)),
        ("https://civitai.com/api/download/models/34?fileId=5", CivitaiFile(34, file=5)),
        (URL, WebFile(URL)),
        (f"{URL}?X-Signature=a%2Fb#c", WebFile(f"{URL}?X-Signature=a%2Fb")),
    ],
)
def test_forms(text: str, reference: Reference) -> None:
    assert parse(text) == reference


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "none of the forms"),
        ("lora", "none of the forms"),
        ("lora.ckpt", "none of the forms"),
        (".hidden.safetensors", "none of the forms"),
        ("../x.safetensors", "none of the forms"),
        ("/etc/x.safetensors", "none of the forms"),
        ("a\\b.safetensors", "none of the forms"),
        ("a\0.safetensors", "none of the forms"),
        ("owner/repo/file.ckpt", "none of the forms"),
        ("owner/repo/../../x.safetensors", r"named \. or \.\."),
        ("../repo/x.safetensors", "none of the forms"),
        ("owner/repo@../x/f.safetensors", r"named \. or \.\."),
        ("owner/repo@a/f.safetensors@b", "two revisions"),
        ("owner/repo@a?b", "none of the forms"),
        ("civitai:12", "none of the forms"),
        ("urn:air:flux1:lora:civitai:1@2", "none of the forms"),
        ("urn:air:sdxl:checkpoint:civitai:1@2", "none of the forms"),
        ("a" * 2001, "2001 characters"),
        ("http://files.test/b.safetensors", "must begin with https"),
        ("file:///b.safetensors", "must begin with https"),
        ("https://files.test/b.zip?x=.safetensors", "must end in .safetensors"),
        ("https://files.test/a b.safetensors", "no space"),
        ("https://files.test/a\r\nHost:x.safetensors", "no space"),
        ("https://[x/b.safetensors", "not a URL"),
        ("https://huggingface.co/owner/repo/resolve/main/f.ckpt", "no safetensors file"),
        ("https://huggingface.co/owner/repo/resolve/main/%2e%2e/f.safetensors", "named"),
        ("https://huggingface.co/owner/repo/resolve/%2e%2e/f.safetensors", "named"),
        ("https://huggingface.co/api/models/owner/repo", "no safetensors file"),
        ("https://civitai.com/models/12", "no version"),
        ("https://civitai.com/models/12?modelVersionId=x", "no version"),
        ("https://civitai.com/api/download/models/34?fileId=x", "no version"),
        ("https://civitai.com/api/download/models/34?token=abc", "token has no place"),
        ("https://civitai.com/user/x.safetensors", "no version"),
    ],
)
def test_what_is_none_of_them_is_refused_with_the_way_out(text: str, said: str) -> None:
    with pytest.raises(LoraError, match=said) as caught:
        parse(text)
    assert caught.value.remedy


@pytest.mark.parametrize("source", LORA_SOURCES)
def test_each_source_is_allowed_on_its_own(source: str) -> None:
    texts = {"local": "a.safetensors", "huggingface": "a/b", "civitai": "civitai:1@2", "https": URL}
    for name, text in texts.items():
        reference = parse(text)
        assert reference.source == name
        if name == source:
            check_allowed(reference, (source,))
        else:
            with pytest.raises(LoraError, match=f"from {name}.*from {source}.*DMD2_LORA_SOURCES"):
                check_allowed(reference, (source,))


def test_what_is_shown_of_a_url_holds_no_credentials() -> None:
    assert without_secrets("https://user:secret@files.test/a.safetensors?secret#secret") == (
        "https://files.test/a.safetensors"
    )
    for url in ("https://u:p@secret@h/x", "https:/u:secret@h/x", "u:secret@h/x", "//secret@h/x"):
        shown = without_secrets(url)
        assert "secret" not in shown
        assert shown.endswith("h/x")
    for text in (
        "owner/repo@v1",
        "civitai:1@2",
        "urn:air:sdxl:lora:civitai:1@2",
        "a/b/c.safetensors",
    ):
        assert without_secrets(text) == text
