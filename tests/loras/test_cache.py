"""The folder of fetched LoRAs, and those who share it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest
from hostile_web import HostileWeb, Reply, lora

from dmd2.errors import DMD2Error, LoraError
from dmd2.loras.cache import Entry, LoraCache
from dmd2.loras.fetching import LoraFetcher
from dmd2.settings import ROOT

CONTENTS = [bytes([i]) * 100 for i in range(8)]


def put(cache: LoraCache, key: str, body: bytes, num_chunks: int = 1) -> BinaryIO:
    """Fetch a content, and use it until what is returned is closed."""
    chunks = [body[i::num_chunks] for i in range(num_chunks)]
    with cache.claim(key, threading.Event()) as part:
        sha256 = cache.write(part, chunks)
        cache.remember(key, Entry(sha256, "", is_private=False))
        return cache.keep(part, sha256)


def has(cache: LoraCache, key: str) -> bool:
    found = cache.find(key, None)
    if found is not None:
        found[1].close()
    return found is not None


def files(cache: LoraCache) -> list[Path]:
    return [each for each in cache.folder.iterdir() if each.suffix in (".safetensors", ".part")]


@pytest.fixture
def cache(tmp_path: Path) -> LoraCache:
    return LoraCache(tmp_path / "cache", max_bytes=350)


def test_what_was_used_longest_ago_goes_first(cache: LoraCache) -> None:
    for i in range(3):
        put(cache, str(i), CONTENTS[i]).close()
    assert has(cache, "0"), "and was used now"
    put(cache, "3", CONTENTS[3]).close()
    assert [has(cache, str(i)) for i in range(4)] == [True, False, True, True]


def test_what_is_in_use_stays(cache: LoraCache) -> None:
    used = put(cache, "0", CONTENTS[0])
    for i in range(1, 5):
        put(cache, str(i), CONTENTS[i]).close()
    assert [has(cache, str(i)) for i in range(5)] == [True, False, False, True, True]
    assert Path(used.name).read_bytes() == CONTENTS[0]
    used.close()
    for i in range(5, 8):
        put(cache, str(i), CONTENTS[i]).close()
    assert not has(cache, "0")


def test_where_all_is_in_use_nothing_is_added(cache: LoraCache) -> None:
    used = [put(cache, str(i), CONTENTS[i]) for i in range(3)]
    with pytest.raises(LoraError, match="does not fit into the 350 bytes"):
        put(cache, "3", CONTENTS[3])
    assert sorted(path.stat().st_size for path in files(cache)) == [100, 100, 100]
    used[0].close()
    put(cache, "3", CONTENTS[3]).close()


def test_the_disk_is_bounded_while_files_grow(cache: LoraCache) -> None:
    most = 0

    def growing() -> Iterator[bytes]:
        nonlocal most
        for _ in range(10):
            yield bytes(60)
            most = max(most, sum(path.stat().st_size for path in files(cache)))

    put(cache, "0", CONTENTS[0]).close()
    with (
        cache.claim("a", threading.Event()) as one,
        cache.claim("b", threading.Event()) as other,
    ):
        cache.write(one, [bytes(150)])
        with pytest.raises(LoraError, match="does not fit"):
            cache.write(other, growing())
    assert 250 < most <= 350
    assert files(cache) == []


def test_one_content_is_kept_once(cache: LoraCache) -> None:
    first = put(cache, "0", CONTENTS[0])
    second = put(cache, "again", CONTENTS[0])
    assert first.name == second.name
    assert len(files(cache)) == 1
    first.close()
    for i in range(1, 5):
        put(cache, str(i), CONTENTS[i]).close()
    assert has(cache, "again"), "in use by the second"


@pytest.mark.parametrize("damage", [b"", CONTENTS[0][1:], CONTENTS[0] + b"x", b"x" * 100])
def test_a_damaged_file_is_fetched_anew(cache: LoraCache, damage: bytes) -> None:
    put(cache, "0", CONTENTS[0]).close()
    (path,) = files(cache)
    path.write_bytes(damage)
    fresh = LoraCache(cache.folder, 350)
    assert not has(fresh, "0")
    put(fresh, "0", CONTENTS[0]).close()
    assert path.read_bytes() == CONTENTS[0]
    path.write_bytes(damage[:50])
    assert not has(fresh, "0"), "another size is seen at each use"


def test_a_damaged_index_only_forgets(cache: LoraCache) -> None:
    put(cache, "0", CONTENTS[0]).close()
    half = json.dumps({hashlib.sha256(b"0").hexdigest(): {"sha256": 1}})
    for damage in ("", "[]", "{", '{"a": 1}', half):
        (cache.folder / "index.json").write_text(damage)
        assert not has(cache, "0")
        put(cache, "0", CONTENTS[0]).close()
        assert has(cache, "0")


def test_the_index_is_bounded(cache: LoraCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmd2.loras.cache._MAX_ENTRIES", 2)
    for i in range(3):
        put(cache, str(i), CONTENTS[0]).close()
    assert [has(cache, str(i)) for i in range(3)] == [False, True, True]


def test_what_another_process_left_half_done_goes(cache: LoraCache) -> None:
    (cache.folder / "left.part").write_bytes(bytes(300))
    put(cache, "0", CONTENTS[0]).close()
    assert [path.stat().st_size for path in files(cache)] == [100]


def test_half_of_the_disk_is_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500))
    put(LoraCache(tmp_path, 200), "0", CONTENTS[0]).close()
    assert caplog.records == []
    assert LoraCache(tmp_path, 400).max_bytes == 300, "what is there counts as free"
    assert "300 bytes, half of what" in caplog.text


def test_the_folder_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LoraCache(tmp_path / "new", 1).folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "theirs").mkdir()
    if os.getuid() == 0:
        os.chown(tmp_path / "theirs", 1, 1)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(DMD2Error, match=r"DMD2_LORA_CACHE_DIR=.*another user"):
        LoraCache(tmp_path / "theirs", 1)
    (tmp_path / "file").touch()
    with pytest.raises(DMD2Error, match=r"DMD2_LORA_CACHE_DIR=.*file"):
        LoraCache(tmp_path / "file" / "x", 1)


HOLD = """
import sys, threading
from pathlib import Path
from dmd2.loras.cache import LoraCache
cache = LoraCache(Path(sys.argv[1]), 350)
entry, file = cache.find("0", None)
with cache.claim("busy", threading.Event()):
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_processes_share_it(cache: LoraCache) -> None:
    """What one uses the other does not delete, what one fetches the other waits for."""
    put(cache, "0", CONTENTS[0]).close()
    command = [sys.executable, "-c", HOLD, str(cache.folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds\n"
        for i in range(1, 5):
            put(cache, str(i), CONTENTS[i]).close()
        assert has(cache, "0")
        cancelled = threading.Event()
        threading.Timer(0.2, cancelled.set).start()
        with pytest.raises(CancelledError), cache.claim("busy", cancelled):
            pass
        process.kill()
    put(cache, "busy", CONTENTS[5]).close()
    for i in (6, 7):
        put(cache, str(i), CONTENTS[i]).close()
    assert not has(cache, "0")


class Slow:
    """A URL whose body is held back after its first half until it is let go."""

    url, key = "https://files.test/slow.safetensors", ("files.test", "/slow.safetensors")

    def __init__(self, web: HostileWeb) -> None:
        self.web, self.go, self.num_asked = web, threading.Event(), 0
        web.answers[self.key] = self.answer

    def answer(self, handler: BaseHTTPRequestHandler) -> Reply:
        if handler.headers["If-None-Match"]:
            return Reply(status=304)
        self.num_asked += 1
        body = lora()

        def rest(handler: BaseHTTPRequestHandler) -> None:
            self.go.wait(10)
            handler.wfile.write(body[1000:])

        return Reply(body[:1000], length=len(body), headers={"ETag": '"1"'}, then=rest)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


Ask = Callable[[LoraFetcher, threading.Event], Future[str]]


@pytest.fixture
def ask() -> Iterable[Ask]:
    with ThreadPoolExecutor() as pool:

        def ask(fetcher: LoraFetcher, cancelled: threading.Event) -> Future[str]:
            def work() -> str:
                with fetcher.get("lora_weights", Slow.url, cancelled) as file:
                    return file.sha256

            return pool.submit(work)

        yield ask


def test_one_fetches_and_the_others_wait_and_each_may_leave(
    web: HostileWeb, tmp_path: Path, ask: Ask
) -> None:
    slow, fetcher = Slow(web), web.fetcher(tmp_path)
    events = [threading.Event() for _ in range(3)]
    first = ask(fetcher, events[0])
    wait_until(lambda: slow.num_asked == 1)
    second, third = (ask(fetcher, event) for event in events[1:])
    events[1].set()
    with pytest.raises(CancelledError):
        second.result(5)
    assert not first.done()
    assert not third.done()
    slow.go.set()
    expected = hashlib.sha256(lora()).hexdigest()
    assert first.result(5) == third.result(5) == expected
    assert slow.num_asked == 1


def test_if_the_one_who_fetches_leaves_the_next_one_fetches(
    web: HostileWeb, tmp_path: Path, ask: Ask
) -> None:
    slow, fetcher = Slow(web), web.fetcher(tmp_path)
    events = [threading.Event() for _ in range(2)]
    first = ask(fetcher, events[0])
    wait_until(lambda: slow.num_asked == 1)
    second = ask(fetcher, events[1])
    events[0].set()
    with pytest.raises(CancelledError):
        first.result(5)
    wait_until(lambda: slow.num_asked == 2)
    slow.go.set()
    assert second.result(5) == hashlib.sha256(lora()).hexdigest()


def test_who_leaves_in_the_middle_leaves_nothing(web: HostileWeb, tmp_path: Path, ask: Ask) -> None:
    slow, fetcher, cancelled = Slow(web), web.fetcher(tmp_path), threading.Event()
    first = ask(fetcher, cancelled)
    wait_until(lambda: slow.num_asked == 1)
    cancelled.set()
    with pytest.raises(CancelledError):
        first.result(5)
    assert files(fetcher._cache) == []
