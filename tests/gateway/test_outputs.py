"""Outputs as files: whole, private, unguessable, and gone when told."""

from __future__ import annotations

import asyncio
import base64
import os
import stat
import threading
from pathlib import Path

import pytest
from gateway.fake_engines import answer_to, prediction, work

from deploy.gateway.keeping.outputs import MEDIA_TYPES, NAMES, Outputs, OutputsError

URLS = tuple(
    f"data:{media_type};base64,".encode() + base64.b64encode(media_type.encode() * 9)
    for media_type in MEDIA_TYPES.values()
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def outputs(tmp_path: Path) -> Outputs:
    return Outputs(tmp_path / "outputs")


def test_outputs_come_back_as_they_were(outputs: Outputs) -> None:
    names = asyncio.run(outputs.keep(URLS))
    assert asyncio.run(outputs.data_urls(names)) == URLS
    assert asyncio.run(outputs.data_urls(names[::-1])) == URLS[::-1]
    paths = [outputs.path(name) for name in names]
    assert [path.read_bytes() for path in paths if path] == [
        media_type.encode() * 9 for media_type in MEDIA_TYPES.values()
    ]
    assert [MEDIA_TYPES[path.suffix] for path in paths if path] == list(MEDIA_TYPES.values())
    assert outputs.num_bytes(names) == 9 * sum(map(len, MEDIA_TYPES.values()))


def test_names_are_unguessable_and_nobodys_but_the_owners(outputs: Outputs, tmp_path: Path) -> None:
    names = asyncio.run(outputs.keep(URLS * 4))
    assert len(set(names)) == len(names)
    assert all(NAMES.fullmatch(name) for name in names)
    assert sorted(names) == names_in(tmp_path / "outputs")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "outputs").iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "outputs").stat().st_mode) == 0o700


def test_no_outputs_are_no_files(outputs: Outputs, tmp_path: Path) -> None:
    assert asyncio.run(outputs.keep(())) == ()
    assert asyncio.run(outputs.data_urls(())) == ()
    assert names_in(tmp_path / "outputs") == []


def test_a_prediction_in_memory_needs_no_file(outputs: Outputs) -> None:
    one = prediction("a")
    one.outcome = answer_to(work("a"))
    assert asyncio.run(outputs.of(one)) == one.outcome.outputs
    one.outcome, one.files = None, asyncio.run(outputs.keep(URLS))
    assert asyncio.run(outputs.of(one)) == URLS


def test_a_file_is_synced_before_it_has_its_name_and_the_name_after(
    outputs: Outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        seen.append(f"sync {path.suffix or path.name} {path.stat().st_size if path.suffix else ''}")
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        seen.append(f"rename {path.suffix} {target.suffix}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    asyncio.run(outputs.keep(URLS[:1]))
    assert seen == ["sync .part 81", "rename .part .png", "sync outputs "]


def test_a_disk_that_refuses_the_second_has_neither(
    outputs: Outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, num_calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputsError, match="could not be kept: No space left on device"):
        asyncio.run(outputs.keep(URLS))
    assert names_in(tmp_path / "outputs") == []


@pytest.mark.parametrize(
    "wrong",
    [
        b"https://x.org/a.png",
        b"data:text/html;base64,AAAA",
        b"data:image/png;base64,A",
        b"data:image/png;base64,AA~A",
        b"",
    ],
)
def test_what_is_no_image_is_not_kept(wrong: bytes, outputs: Outputs, tmp_path: Path) -> None:
    with pytest.raises(OutputsError, match="cannot be kept"):
        asyncio.run(outputs.keep((URLS[0], wrong)))
    assert names_in(tmp_path / "outputs") == []


def test_what_was_deleted_says_so(outputs: Outputs) -> None:
    names = asyncio.run(outputs.keep(URLS))
    outputs.remove(names[1:2])
    outputs.remove(names[1:2])
    with pytest.raises(OutputsError, match="were deleted"):
        asyncio.run(outputs.data_urls(names))
    assert asyncio.run(outputs.data_urls(names[:1])) == URLS[:1]
    assert outputs.path(names[1]) is None
    assert outputs.num_bytes(names[1:2]) == 0


@pytest.mark.parametrize(
    "name", ["../journal.sqlite", "", ".", "a.png", "/etc/passwd", f"{'0' * 32}.png\n"]
)
def test_no_name_leads_elsewhere(name: str, outputs: Outputs, tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_text("secret")
    (tmp_path / "outputs" / "a.png").write_text("not ours")
    assert outputs.path(name) is None
    with pytest.raises(OutputsError):
        asyncio.run(outputs.data_urls([name]))


def test_strays_go_and_nothing_else(outputs: Outputs, tmp_path: Path) -> None:
    names = asyncio.run(outputs.keep(URLS))
    folder = tmp_path / "outputs"
    (folder / f"{'0' * 32}.png").write_bytes(b"half")
    (folder / f"{'0' * 32}.webp.part").write_bytes(b"half")
    (folder / "readme.txt").write_text("not ours")
    outputs.remove_all_but(names[:2])
    assert names_in(folder) == sorted([*names[:2], "readme.txt"])


def test_reading_and_writing_are_off_the_loop_s_thread(
    outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    encode, decode = base64.b64encode, base64.b64decode

    def noted(function):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        def called(*args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: ANN002, ANN003, ANN202
            threads.add(threading.current_thread().name)
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(base64, "b64encode", noted(encode))
    monkeypatch.setattr(base64, "b64decode", noted(decode))
    asyncio.run(outputs.data_urls(asyncio.run(outputs.keep(URLS))))
    assert threads
    assert all(name.startswith("dmd2-gateway-outputs") for name in threads)


def test_what_was_begun_is_written_before_the_end(outputs: Outputs, tmp_path: Path) -> None:
    async def test() -> None:
        keeping = [asyncio.create_task(outputs.keep(URLS)) for _ in range(8)]
        await asyncio.sleep(0)
        outputs.close()
        await asyncio.gather(*keeping)

    asyncio.run(test())
    assert len(names_in(tmp_path / "outputs")) == 8 * len(URLS)
