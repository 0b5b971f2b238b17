"""From what a user writes to a file, by way of a hub, a Civitai and hosts that mean harm."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hostile_web import HostileWeb, Reply, as_json, has_secret, lora, redirect, silence

from dmd2.errors import DMD2Error, DownloadError, InvalidRequestError
from dmd2.loras.fetching import LoraFetcher, LoraFile
from dmd2.settings import Settings

COMMIT, NEXT_COMMIT = "a" * 40, "b" * 40
HUB, CDN = "huggingface.co", "cdn.test"
URL = "https://files.test/a%20style.safetensors?X-Signature=secret"
KEY = ("files.test", "/a%20style.safetensors")
TOKEN = "secret-token"


def get(fetcher: LoraFetcher, text: Any, **tokens: str) -> LoraFile:
    return fetcher.get("lora_weights", text, threading.Event(), **tokens)


def refusal(fetcher: LoraFetcher, text: Any, **tokens: str) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        get(fetcher, text, **tokens)
    said = str(caught.value)
    assert not has_secret(said)
    assert said.startswith("lora_weights: ")
    return said


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def store(body: bytes) -> Any:
    """A bucket behind presigned URLs, which wants no other credentials."""

    def answer(handler: BaseHTTPRequestHandler) -> Reply:
        return Reply(status=400) if handler.headers["Authorization"] else Reply(body)

    return answer


def for_holders(reply: Reply, status: int = 401) -> Any:
    """The reply for whoever has the token."""

    def answer(handler: BaseHTTPRequestHandler) -> Reply:
        is_known = handler.headers["Authorization"] == f"Bearer {TOKEN}"
        return reply if is_known else Reply(status=status)

    return answer


def give_repo(web: HostileWeb, files: dict[str, bytes], commit: str = COMMIT) -> None:
    """owner/repo at main, as the hub has it: an API, and redirects to a bucket."""
    siblings = [
        {"rfilename": name, "size": len(body), "lfs": {"sha256": sha256(body), "size": len(body)}}
        for name, body in files.items()
    ]
    listing = as_json({"sha": commit, "siblings": [*siblings, {"rfilename": "README.md"}]})
    for revision in ("main", commit):
        web.answers[HUB, f"/api/models/owner/repo/revision/{revision}"] = listing
    for name, body in files.items():
        path = f"/owner/repo/resolve/{commit}/{name}"
        web.answers[HUB, path] = redirect(f"https://{CDN}/{commit}/{name}?X-Amz-Signature=secret")
        web.answers[CDN, f"/{commit}/{name}"] = store(body)


def give_version(web: HostileWeb, body: bytes, **changes: Any) -> dict[str, Any]:
    """Version 34 of model 12, as Civitai has it."""
    file = {
        "id": 5,
        "name": "A style: v1.safetensors",
        "type": "Model",
        "primary": True,
        "metadata": {"format": "SafeTensor"},
        "hashes": {"SHA256": sha256(body).upper()},
    }
    version = {"id": 34, "modelId": 12, "model": {"type": "LORA"}, "files": [file], **changes}
    for host in ("civitai.com", "civitai.red"):
        web.answers[host, "/api/v1/model-versions/34"] = as_json(version)
        link = redirect(f"https://{CDN}/style?X-Amz-Signature=secret", 307)
        web.answers[host, "/api/download/models/34"] = link
    web.answers[CDN, "/style"] = store(body)
    return file


def left(folder: Path) -> list[str]:
    """What a cache holds of files, whole or in part."""
    return sorted(path.name for path in (folder / "cache").iterdir() if path.suffix[1:] in SUFFIXES)


SUFFIXES = ("safetensors", "part")


def test_nothing_is_taken_from_anywhere_unless_the_operator_says_so(tmp_path: Path) -> None:
    fetcher = LoraFetcher(Settings("m", lora_cache_dir=tmp_path / "cache"))
    for text in ("a.safetensors", "owner/repo", "civitai:1@2", URL, "nonsense"):
        assert "DMD2_LORA_SOURCES is empty" in refusal(fetcher, text)
    assert not (tmp_path / "cache").exists()


def test_only_allowed_sources_are_asked(web: HostileWeb, tmp_path: Path) -> None:
    fetcher = web.fetcher(tmp_path, lora_sources=("local", "huggingface"))
    assert "takes LoRAs from local, huggingface" in refusal(fetcher, URL)
    assert web.resolved == []


@pytest.mark.parametrize("text", [None, 1, ["a"]])
def test_no_text(web: HostileWeb, tmp_path: Path, text: object) -> None:
    assert "must be text" in refusal(web.fetcher(tmp_path), text)


def test_local_files_by_name(web: HostileWeb, tmp_path: Path) -> None:
    fetcher = web.fetcher(tmp_path)
    (tmp_path / "own" / "my style.safetensors").write_bytes(lora())
    (tmp_path / "secret.safetensors").write_bytes(lora())
    (tmp_path / "own" / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (tmp_path / "own" / "again.safetensors").symlink_to("my style.safetensors")
    (tmp_path / "own" / "folder.safetensors").mkdir()
    (tmp_path / "own" / "notes.txt").touch()
    with get(fetcher, "my style.safetensors") as file, get(fetcher, "again.safetensors") as again:
        assert (file.name, file.sha256) == ("my style", sha256(lora()))
        assert file.path.read_bytes() == again.path.read_bytes() == lora()
    there = "there are: again.safetensors, my style.safetensors. Use"
    for name in ("other.safetensors", "out.safetensors", "folder.safetensors"):
        assert there in refusal(fetcher, name)
    (tmp_path / "own" / "my style.safetensors").write_bytes(lora(1))
    assert get(fetcher, "my style.safetensors").sha256 == sha256(lora(1))


def test_a_folder_that_is_missing_fails_at_setup(web: HostileWeb, tmp_path: Path) -> None:
    with pytest.raises(DMD2Error, match=r"DMD2_LORA_DIR=.*absent is not a folder"):
        web.fetcher(tmp_path, lora_dir=tmp_path / "absent")


def test_the_hubs_files(web: HostileWeb, tmp_path: Path) -> None:
    give_repo(web, {"x.safetensors": lora()})
    fetcher = web.fetcher(tmp_path)
    with get(fetcher, "owner/repo") as file:
        assert (file.name, file.sha256) == ("x", sha256(lora()))
        assert file.path.read_bytes() == lora()
    assert web.paths(CDN) == [f"/{COMMIT}/x.safetensors?X-Amz-Signature=secret"]
    get(fetcher, "owner/repo/x.safetensors").close()
    assert len(web.paths(CDN)) == 1, "the commit is the same"
    give_repo(web, {"x.safetensors": lora(1)}, NEXT_COMMIT)
    assert get(fetcher, "owner/repo").sha256 == sha256(lora(1))


def test_a_pinned_file_that_is_there_needs_no_network(web: HostileWeb, tmp_path: Path) -> None:
    give_repo(web, {"x.safetensors": lora()})
    fetcher, text = web.fetcher(tmp_path), f"owner/repo/x.safetensors@{COMMIT}"
    get(fetcher, text).close()
    web.seen.clear()
    assert get(fetcher, text).sha256 == sha256(lora())
    assert web.seen == []


def test_a_repository_of_several_files(web: HostileWeb, tmp_path: Path) -> None:
    give_repo(web, {"a.safetensors": lora(), "b/c.safetensors": lora(1), "d.ckpt": b""})
    fetcher = web.fetcher(tmp_path)
    said = refusal(fetcher, "owner/repo")
    assert "several files: a.safetensors, b/c.safetensors" in said
    assert get(fetcher, "owner/repo/b/c.safetensors").sha256 == sha256(lora(1))
    assert "it has a.safetensors, b/c.safetensors" in refusal(fetcher, "owner/repo/e.safetensors")
    give_repo(web, {"d.ckpt": b""})
    assert "no such .safetensors file; it has none" in refusal(fetcher, "owner/repo")


def test_a_file_that_the_hub_has_another_hash_of(web: HostileWeb, tmp_path: Path) -> None:
    give_repo(web, {"x.safetensors": lora()})
    web.answers[CDN, f"/{COMMIT}/x.safetensors"] = Reply(lora(1))
    assert "sha256 is not" in refusal(web.fetcher(tmp_path), "owner/repo")
    assert left(tmp_path) == []


def test_tokens_open_what_is_closed_and_stay_with_their_source(
    web: HostileWeb, tmp_path: Path
) -> None:
    give_repo(web, {"x.safetensors": lora()})
    listing = "/api/models/owner/repo/revision/main"
    web.answers[HUB, listing] = for_holders(web.answers[HUB, listing])  # type: ignore[arg-type]
    fetcher = web.fetcher(tmp_path)
    assert "answered 401" in (said := refusal(fetcher, "owner/repo", civitai_api_token=TOKEN))
    assert "give hf_api_token" in said
    assert "hf_api_token that was given lacks access" in refusal(
        fetcher, "owner/repo", hf_api_token="secret-of-another"
    )
    get(fetcher, "owner/repo", hf_api_token=TOKEN).close()
    assert {seen.host for seen in web.seen if "Authorization" in seen.headers} == {HUB}
    web.answers[KEY] = Reply(lora())
    get(fetcher, URL, hf_api_token=TOKEN, civitai_api_token=TOKEN).close()
    assert "Authorization" not in web.seen[-1].headers


def test_the_cache_gives_a_gated_file_to_nobody_else(web: HostileWeb, tmp_path: Path) -> None:
    give_repo(web, {"x.safetensors": lora()})
    link = f"/owner/repo/resolve/{COMMIT}/x.safetensors"
    web.answers[HUB, link] = for_holders(web.answers[HUB, link], 403)  # type: ignore[arg-type]
    fetcher = web.fetcher(tmp_path)
    get(fetcher, "owner/repo", hf_api_token=TOKEN).close()
    pinned = f"owner/repo/x.safetensors@{COMMIT}"
    for text in ("owner/repo", pinned):
        assert "answered 403" in refusal(fetcher, text)
    web.answers[CDN, f"/{COMMIT}/x.safetensors"] = Reply(b"x", length=4000, then=silence)
    with get(fetcher, pinned, hf_api_token=TOKEN) as file:
        assert file.path.read_bytes() == lora(), "it is not sent again"


@pytest.mark.parametrize(
    "text", ["civitai:12@34", "https://civitai.red/models/12?modelVersionId=34"]
)
def test_civitais_files(web: HostileWeb, tmp_path: Path, text: str) -> None:
    give_version(web, lora())
    fetcher = web.fetcher(tmp_path)
    with get(fetcher, text, civitai_api_token=TOKEN) as file:
        assert (file.name, file.sha256) == ("A style_ v1", sha256(lora()))
    host = "civitai.red" if "red" in text else "civitai.com"
    assert [(seen.host, seen.path) for seen in web.seen] == [
        (host, "/api/v1/model-versions/34"),
        (host, "/api/download/models/34?fileId=5"),
        (CDN, "/style?X-Amz-Signature=secret"),
    ]


def test_a_file_that_civitai_has_another_hash_of(web: HostileWeb, tmp_path: Path) -> None:
    give_version(web, lora())
    web.answers[CDN, "/style"] = Reply(lora(1))
    assert "sha256 is not" in refusal(web.fetcher(tmp_path), "civitai:12@34")
    assert left(tmp_path) == []


def test_civitais_primary_file_or_the_one_that_is_named(web: HostileWeb, tmp_path: Path) -> None:
    file = give_version(web, lora())
    other = {**file, "id": 4, "primary": False}
    training = {**file, "id": 3, "type": "Training Data"}
    pickled = {**file, "id": 2, "metadata": {"format": "PickleTensor"}}
    give_version(web, lora(), files=[training, pickled, other, file])
    fetcher, link = web.fetcher(tmp_path), "https://civitai.com/api/download/models/34"
    for text, chosen in ((link, 5), (f"{link}?fileId=4", 4)):
        get(fetcher, text).close()
        assert f"/api/download/models/34?fileId={chosen}" in web.paths("civitai.com")
    assert "its formats: PickleTensor" in refusal(fetcher, f"{link}?fileId=2")
    assert "its formats: none" in refusal(fetcher, f"{link}?fileId=3")


def test_what_is_no_lora_on_civitai(web: HostileWeb, tmp_path: Path) -> None:
    fetcher = web.fetcher(tmp_path)
    give_version(web, lora(), model={"type": "Checkpoint"})
    assert "it is a Checkpoint, not a LoRA" in refusal(fetcher, "civitai:12@34")
    give_version(web, lora())
    assert "version 34 is not one of model 13" in refusal(fetcher, "civitai:13@34")
    assert "civitai.com answered 404" in refusal(fetcher, "civitai:34@12")


def test_what_civitai_asks_a_login_for(web: HostileWeb, tmp_path: Path) -> None:
    give_version(web, lora())
    fetcher = web.fetcher(tmp_path)
    for reply in (
        Reply(status=401),
        Reply(status=403),
        Reply(b"<html>Sign in</html>", headers={"Content-Type": "text/html; charset=utf-8"}),
    ):
        web.answers["civitai.com", "/api/download/models/34"] = reply
        assert "give civitai_api_token" in refusal(fetcher, "civitai:12@34")
        assert "early access" in refusal(fetcher, "civitai:12@34", civitai_api_token=TOKEN)


@pytest.mark.parametrize(
    "body", [b"{}", b"[]", b'"x"', b"null", b"<html>", b"", b"[" * 100_000, b'{"siblings": [1]}']
)
def test_an_api_that_answers_nonsense(web: HostileWeb, tmp_path: Path, body: bytes) -> None:
    web.answers[HUB, "/api/models/owner/repo/revision/main"] = Reply(body)
    web.answers["civitai.com", "/api/v1/model-versions/34"] = Reply(body)
    for text in ("owner/repo", "civitai:12@34"):
        assert re.search("does not answer JSON|never did", refusal(web.fetcher(tmp_path), text))


def test_a_commit_that_is_a_path(web: HostileWeb, tmp_path: Path) -> None:
    give_repo(web, {"x.safetensors": lora()}, commit="../../secret")
    assert "never did" in refusal(web.fetcher(tmp_path), "owner/repo")


def test_any_url_is_asked_whether_it_changed(web: HostileWeb, tmp_path: Path) -> None:
    """And is taken from the cache only if it says that it did not."""
    body, answered = lora(), []

    def answer(handler: BaseHTTPRequestHandler) -> Reply:
        etag = f'"{sha256(body)[:8]}"'
        is_same = handler.headers["If-None-Match"] == etag
        answered.append(304 if is_same else 200)
        return Reply(b"" if is_same else body, answered[-1], {"ETag": etag})

    web.answers[KEY] = answer
    fetcher = web.fetcher(tmp_path)
    assert get(fetcher, URL).name == "a style"
    assert get(fetcher, URL).sha256 == sha256(body)
    body = lora(1)
    assert get(fetcher, URL).sha256 == sha256(body)
    assert answered == [200, 304, 200]
    web.answers[KEY] = Reply(lora(2), headers={"ETag": '"x"\r\n X: y'})
    assert get(fetcher, URL).sha256 == sha256(lora(2))
    web.answers[KEY] = Reply(lora(3))
    assert get(fetcher, URL).sha256 == sha256(lora(3)), "an ETag that is none is not sent"


@pytest.mark.parametrize("status", [304, 404, 410, 416, 429, 500, 503])
def test_an_answer_that_is_no_file(web: HostileWeb, tmp_path: Path, status: int) -> None:
    web.answers[KEY] = Reply(status=status)
    assert f"files.test answered {status}" in refusal(web.fetcher(tmp_path), URL)
    assert left(tmp_path) == []


def test_a_full_disk_is_the_operators_business(
    web: HostileWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.answers[KEY] = Reply(lora())
    fetcher = web.fetcher(tmp_path)

    def make_room(num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetcher._cache, "_make_room", make_room)
    with pytest.raises(DownloadError, match=r"No space left on device.*DMD2_LORA_CACHE_DIR"):
        get(fetcher, URL)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "token", ["secret\r\nX: y", "s\u00e9cret-secret", "a secret", "secret" * 100]
)
def test_a_token_that_is_none(web: HostileWeb, tmp_path: Path, token: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^civitai_api_token") as caught:
        get(web.fetcher(tmp_path), "civitai:1@2", civitai_api_token=token)
    assert "(secret)" in str(caught.value)
    assert not has_secret(str(caught.value).replace("(secret)", ""))
    assert web.seen == []


def test_credentials_are_nowhere(
    web: HostileWeb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in logs, nor in names, nor on disk, when all goes well."""
    caplog.set_level(logging.DEBUG)
    give_repo(web, {"x.safetensors": lora()})
    give_version(web, lora(1))
    web.answers[KEY] = Reply(lora(2), headers={"ETag": '"1"'})
    fetcher = web.fetcher(tmp_path)
    tokens = {"hf_api_token": TOKEN, "civitai_api_token": TOKEN}
    files = [get(fetcher, text, **tokens) for text in ("owner/repo", "civitai:12@34", URL)]
    assert len(caplog.records) == 3
    for text in (caplog.text, repr(files), repr(fetcher)):
        assert not has_secret(text)
    for path in (tmp_path / "cache").iterdir():
        assert not has_secret(path.name + path.read_bytes().decode("latin-1"))
