"""Outputs are bounded in bytes, and none goes before it was handed over."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from cog_server import CogServer
from servers import images_of, start

import dmd2.server.output_space as module
from dmd2.server.output_space import OutputSpace

KB = 1000


def put(folder: Path, name: str, kilobytes: int, *, read: bool) -> Path:
    """An output of a request, which the server has read or not."""
    path = folder / name / "image-0.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"p" * kilobytes * KB)
    now = time.time()
    os.utime(path, (now + 1 if read else now - 1, now))
    return path.parent


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for after a request's end."""
    monkeypatch.setattr(module, "_QUIET_S", 0.0)


@pytest.mark.usefixtures("quiet")
def test_what_was_handed_over_goes_oldest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FREED_SHARE", 0.0)
    old, unread, running, young = (
        put(tmp_path, name, 24, read=name != "unread")
        for name in ("old", "unread", "running", "young")
    )
    space = OutputSpace(tmp_path, 100 * KB)
    for folder in (old, unread, young):
        space.over(folder)
    assert space.make_room(tmp_path / "a", 20 * KB)
    assert not old.exists()
    assert all(folder.exists() for folder in (unread, running, young))
    assert space.make_room(tmp_path / "b", 20 * KB)
    assert not young.exists()
    assert not space.make_room(tmp_path / "c", 20 * KB), "the others may not go"
    assert all(folder.exists() for folder in (unread, running))


def test_what_was_read_stays_for_a_moment_and_what_was_not_for_as_long_as_it_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [put(tmp_path, name, 45, read=name == "read") for name in ("unread", "read")]
    space = OutputSpace(tmp_path, 100 * KB, handing_over_s=120)
    now = time.monotonic()
    for folder in folders:
        space.over(folder)
    for seconds, left in ((4, [True, True]), (6, [True, False]), (119, [True, False])):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
        assert space.make_room(tmp_path / "new", 50 * KB) == (left != [True, True])
        assert [folder.exists() for folder in folders] == left
    space.over(tmp_path / "new")
    monkeypatch.setattr(time, "monotonic", lambda: now + 121)
    assert space.make_room(tmp_path / "large", 90 * KB)
    assert not folders[0].exists()


@pytest.mark.usefixtures("quiet")
def test_what_others_delete_is_noticed(tmp_path: Path) -> None:
    space, one, other = OutputSpace(tmp_path, 50 * KB), tmp_path / "one", tmp_path / "other"
    assert space.make_room(one, 40 * KB)
    assert space.make_room(one, 40 * KB), "it has its room"
    assert not space.make_room(other, 40 * KB), "it is about to be written"
    space.written(one, 40 * KB)
    assert space.make_room(other, 40 * KB), "it was deleted, or never written"


def test_room_that_was_not_needed_is_given_back(tmp_path: Path) -> None:
    space, one, other = OutputSpace(tmp_path, 50 * KB), tmp_path / "one", tmp_path / "other"
    assert space.make_room(one, 40 * KB)
    put(tmp_path, "one", 20, read=False)
    space.written(one, 20 * KB)
    assert not space.make_room(other, 20 * KB)
    space.over(one)
    assert space.make_room(other, 20 * KB)


def test_what_ended_is_noted_without_waiting_and_forgotten_once_it_is_gone(
    tmp_path: Path,
) -> None:
    """Else the event loop would stand still, and the list grow for as long as a server runs."""
    space = OutputSpace(tmp_path, 100 * KB)
    with space._lock:
        for number in range(1000):
            space.over(tmp_path / str(number))
    kept = put(tmp_path, "kept", 1, read=False)
    space.over(kept)
    assert space.make_room(tmp_path / "new", 1)
    assert set(space._over) <= {kept, tmp_path / "999"}
    assert kept in space._over


def test_other_folders_count_too(tmp_path: Path) -> None:
    put(tmp_path / "cog", "input", 60, read=False)
    space = OutputSpace(tmp_path / "out", 100 * KB, [tmp_path / "cog"])
    assert not space.make_room(tmp_path / "out" / "a", 50 * KB)
    assert space.make_room(tmp_path / "out" / "a", 30 * KB)


def test_many_threads_never_pass_the_bound(tmp_path: Path) -> None:
    space, written = OutputSpace(tmp_path, 100 * KB), []

    def write(number: int) -> None:
        if space.make_room(tmp_path / str(number), 9 * KB):
            time.sleep(0.01)
            put(tmp_path, str(number), 9, read=False)
            space.written(tmp_path / str(number), 9 * KB)
            written.append(number)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(write, range(64)))
    assert len(written) == 11


def test_what_an_earlier_server_left_may_go_once_no_request_can_still_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, unread = put(tmp_path, "0" * 32, 20, read=True), put(tmp_path, "1" * 32, 25, read=False)
    other = put(tmp_path, "other", 5, read=False)
    space = OutputSpace(tmp_path, 60 * KB, handing_over_s=120, in_flight_s=900)
    now = time.monotonic()
    assert not space.make_room(tmp_path / "a", 20 * KB)
    monkeypatch.setattr(time, "monotonic", lambda: now + 6)
    assert space.make_room(tmp_path / "a", 20 * KB)
    assert (read.exists(), unread.exists()) == (False, True)
    assert not space.make_room(tmp_path / "b", 20 * KB)
    monkeypatch.setattr(time, "monotonic", lambda: now + 1025)
    assert space.make_room(tmp_path / "b", 20 * KB)
    assert (unread.exists(), other.exists()) == (False, True)


@pytest.mark.usefixtures("quiet")
def test_what_cannot_be_deleted_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = put(tmp_path, "kept", 50, read=True)
    space = OutputSpace(tmp_path, 60 * KB)
    space.over(kept)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda *_, **__: None)
        assert not space.make_room(tmp_path / "new", 20 * KB)
    assert space.make_room(tmp_path / "new", 20 * KB), "it is tried again"


MAX_BYTES = 400 * KB
# As it is served, but for the five seconds that an output stays after its request's end.
IMPATIENT = """
import predict
from dmd2.server import output_space

output_space._QUIET_S = 0.3

class Predictor(predict.Predictor):
    pass
"""


@pytest.fixture(scope="module")
def small(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """A server with space for some forty images."""
    folder = tmp_path_factory.mktemp("small")
    stub = folder / "impatient.py"
    stub.write_text(IMPATIENT)
    environment = {
        "DMD2_OUTPUT_DIR": str(folder / "out"),
        "DMD2_MAX_OUTPUT_BYTES": str(MAX_BYTES),
        "COG_PREDICT_TYPE_STUB": f"{stub}:Predictor",
    }
    with start(model_folder, **environment) as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        server.outputs = folder / "out"
        yield server


def bytes_in(folder: Path) -> int:
    return module.size_of(folder)


def test_three_times_as_many_bytes_as_there_is_space_for_all_arrive(small: CogServer) -> None:
    made, most = 0, 0
    with ThreadPoolExecutor(8) as clients:
        inputs = [{"prompt": "x", "num_outputs": 4, "seed": seed} for seed in range(40)]
        for answer in clients.map(small.predict, inputs):
            made += sum(map(len, images_of(answer)))
            most = max(most, bytes_in(small.outputs))
    assert made > 3 * MAX_BYTES
    assert most <= MAX_BYTES


def test_a_slow_reader_gets_every_byte(small: CogServer) -> None:
    """Its answer is long ready, and its files may be gone."""
    body = {"input": {"prompt": "slow", "num_outputs": 4, "seed": 3}}
    fast = httpx.post(f"{small.url}/predictions", json=body, timeout=60).json()["output"]
    with httpx.stream("POST", f"{small.url}/predictions", json=body, timeout=60) as answer:
        chunks = answer.iter_raw(1000)
        read = [next(chunks)]
        test_three_times_as_many_bytes_as_there_is_space_for_all_arrive(small)
        read += chunks
    assert httpx.Response(200, content=b"".join(read)).json()["output"] == fast
