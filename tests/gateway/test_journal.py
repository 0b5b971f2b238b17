"""The journal: what it keeps, of what it keeps nothing, and when it refuses to open."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from gateway.fake_engines import CARD, answer_to, prediction, work

from deploy.gateway.keeping import journal as journal_module
from deploy.gateway.keeping import journal_file
from deploy.gateway.keeping.journal import Journal
from deploy.gateway.keeping.journal_file import FILE, JournalError
from deploy.gateway.keeping.journal_janitor import JournalJanitor
from deploy.gateway.keeping.kept_work import TOKENS, KeptWork, shown_inputs
from deploy.gateway.prediction import Prediction, Webhook
from deploy.gateway.work import Outcome
from dmd2.errors import InvalidRequestError


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "j")
    yield journal
    journal.close()


def accepted(journal: Journal, *ids: str, **inputs: object) -> list[Prediction]:
    ones = [prediction(id, is_journaled=True, **inputs) for id in ids]  # type: ignore[arg-type]

    async def accept() -> None:
        await asyncio.gather(*map(journal.accepted, ones))

    asyncio.run(accept())
    return ones


def ended(journal: Journal, one: Prediction, age_s: float = 0.0) -> Prediction:
    """A prediction that ended so long ago, written."""
    assert one.work is not None
    said = answer_to(one.work)
    files = asyncio.run(journal.outputs.keep(said.outputs))
    over = datetime.now(UTC) - timedelta(seconds=age_s)
    one = replace(
        one, status="succeeded", outcome=said, files=files, completed_at=over, num_attempts=1
    )
    asyncio.run(journal.finished(one))
    return one


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bytes_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_prediction_is_read_as_it_was_written(journal: Journal) -> None:
    one = prediction("a", is_journaled=True)
    one.model, one.version = "me/model", "f" * 64
    one.webhook = Webhook("https://x.org/hook", ("start", "completed"))
    asyncio.run(journal.accepted(one))
    found = journal.find("a")
    assert found is not None
    same = ("id", "dialect", "inputs", "model", "version", "webhook", "is_journaled", "created_at")
    for name in (*same, "started_at", "completed_at", "status", "num_attempts", "outcome", "files"):
        assert getattr(found, name) == getattr(one, name), name
    assert not found.ended.is_set()
    one.num_attempts, one.status, one.started_at = 3, "processing", datetime.now(UTC)
    asyncio.run(journal.tried(one, 2))
    found = journal.find("a")
    assert found is not None
    assert (found.status, found.num_attempts) == ("processing", 2)
    assert found.started_at == one.started_at
    one = ended(journal, one)
    found = journal.find("a")
    assert found is not None
    assert one.outcome is not None
    assert found.outcome == replace(one.outcome, outputs=())
    assert (found.files, found.completed_at) == (one.files, one.completed_at)
    assert found.ended.is_set()
    assert not found.is_removed
    assert journal.find("b") is None


def test_an_error_is_read_as_it_was_written(journal: Journal) -> None:
    (one,) = accepted(journal, "a")
    outcome = Outcome((), 'no "\ud800" here', "ü\n", {"score": float("inf")})
    asyncio.run(
        journal.finished(
            replace(one, status="failed", outcome=outcome, completed_at=datetime.now(UTC))
        )
    )
    found = journal.find("a")
    assert found is not None
    assert found.outcome == outcome


def test_work_comes_back_with_its_seed_and_every_other_input() -> None:
    asked = work(
        "a",
        prompt='"ü"\n',
        seed=0,
        negative_prompt="x",
        guidance_scale=2,
        num_outputs=3,
        aspect_ratio="16:9",
        output_format="webp",
        output_quality=7,
        embed_metadata=False,
        disable_safety_checker=True,
        lora_weights="me/lora",
        lora_scale=0.0,
    )
    again = KeptWork.of(asked).restored("a", CARD)
    assert again == asked
    assert again.request.size == asked.request.size
    assert again.request.notes == asked.request.notes


def test_a_drawn_seed_is_kept(journal: Journal) -> None:
    one = prediction("a", is_journaled=True)
    one.work, one.inputs = work("a", seed=None), {"prompt": "a cat"}  # type: ignore[arg-type]
    asyncio.run(journal.accepted(one))
    (left,) = journal.unfinished()
    assert left.work.restored("a", CARD) == one.work


@pytest.mark.parametrize(
    "url",
    [
        "https://x.org/l.safetensors?k=s3cr3t",
        "https://s3cr3t@x.org/l.safetensors",
        "https://x.org/l.safetensors#s3cr3t",
    ],
)
def test_no_secret_is_ever_in_the_files(url: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    tokens = {name: f"s3cr3t-{name}" for name in TOKENS}
    one = prediction("a", is_journaled=True, lora_weights=url, extra_lora=url, **tokens)
    asyncio.run(journal.accepted(one))
    asyncio.run(journal.tried(one, 1))
    assert b"s3cr3t" not in bytes_of(tmp_path)
    ended(journal, one)
    assert b"s3cr3t" not in bytes_of(tmp_path)
    journal.close()
    assert b"x.org" in bytes_of(tmp_path)
    assert b"s3cr3t" not in bytes_of(tmp_path)


def test_tokens_are_shown_as_redacted_and_prompts_as_they_are() -> None:
    assert set(TOKENS) == {"hf_api_token", "civitai_api_token"}
    inputs = {
        "prompt": "what? https://me@x.org/?a#b",
        "hf_api_token": "hf_x",
        "civitai_api_token": "",
        "lora_weights": "https://me@x.org/l.safetensors?a",
        "extra_lora": None,
    }
    assert shown_inputs(inputs) == {
        **inputs,
        "hf_api_token": "[REDACTED]",
        "lora_weights": "https://x.org/l.safetensors",
    }


@pytest.mark.parametrize(
    ("inputs", "is_lost"),
    [
        ({}, False),
        ({"hf_api_token": "x"}, False),  # nothing needs it
        ({"lora_weights": "me/lora"}, False),
        ({"lora_weights": "https://x.org/l.safetensors"}, False),
        ({"lora_weights": "me/lora", "civitai_api_token": "x"}, True),
        ({"lora_weights": "https://x.org/l.safetensors?x"}, True),
        ({"lora_weights": "me/lora", "extra_lora": "https://a@x.org/l.safetensors"}, True),
    ],
)
def test_work_is_marked_whose_secret_is_lost(inputs: dict[str, str], is_lost: bool) -> None:
    assert KeptWork.of(work("a", **inputs)).is_secret_lost == is_lost  # type: ignore[arg-type]


def test_none_but_the_owner_may_read(journal: Journal, tmp_path: Path) -> None:
    accepted(journal, "a")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "j").iterdir()}
    assert {modes.pop("outputs"), stat.S_IMODE((tmp_path / "j").stat().st_mode)} == {0o700}
    assert set(modes) >= {FILE, f"{FILE}-wal", f"{FILE}-shm"}
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o777])
def test_a_folder_that_others_may_enter_is_refused(mode: int, tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    (tmp_path / "j").chmod(mode)
    with pytest.raises(JournalError, match=f"mode {mode:04o}.*chmod 700"):
        Journal(tmp_path / "j")
    assert names_in(tmp_path / "j") == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="DMD2_JOURNAL_DIR"):
        Journal(tmp_path / "file" / "j")


def test_there_is_one_gateway_at_a_time(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j")
    for _ in range(2):
        with pytest.raises(JournalError, match=r"another gateway uses .*j, and two would"):
            Journal(tmp_path / "j")
    first.close()
    Journal(tmp_path / "j").close()


def with_sql(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def a_text(path: Path) -> None:
    path.write_text("not a database, but long enough to be read as one" * 99)


def another_database(path: Path) -> None:
    with_sql(path, "CREATE TABLE cats (name)")


def another_version(path: Path) -> None:
    Journal(path.parent).close()
    with_sql(path, "PRAGMA user_version = 7")


def a_damaged_one(path: Path) -> None:
    journal = Journal(path.parent)
    accepted(journal, *map(str, range(99)))
    journal.close()
    content = bytearray(path.read_bytes())
    content[-4096 * 3 : -4096] = os.urandom(4096 * 2)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (a_text, "cannot be opened: file is not a database. Move it away"),
        (another_database, "is not a gateway's journal: move it away"),
        (another_version, "has schema version 7, and this gateway reads 1: let the version"),
        (a_damaged_one, "is damaged .*: move it away|cannot be opened: .*malformed.* Move it away"),
    ],
)
def test_a_file_that_is_not_this_journal_is_refused_and_left_alone(
    make: object, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "j"
    folder.mkdir(mode=0o700)
    make(folder / FILE)  # type: ignore[operator]
    before = (folder / FILE).read_bytes()
    for _ in range(2):  # the first try holds nothing that would keep out the second
        with pytest.raises(JournalError, match=said) as refused:
            Journal(folder)
        assert "DMD2_JOURNAL_DIR" in str(refused.value)
    assert (folder / FILE).read_bytes() == before


def test_a_torn_write_loses_that_write_alone(journal: Journal, tmp_path: Path) -> None:
    accepted(journal, "a")
    accepted(journal, "b")
    torn = tmp_path / "torn"
    torn.mkdir(mode=0o700)
    log = (tmp_path / "j" / f"{FILE}-wal").read_bytes()
    (torn / FILE).write_bytes((tmp_path / "j" / FILE).read_bytes())
    (torn / f"{FILE}-wal").write_bytes(log[:-100])
    again = Journal(torn)
    assert [each.prediction.id for each in again.unfinished()] == ["a"]
    again.close()


def test_each_write_is_synced(journal: Journal) -> None:
    for connection in (journal._writer._connection, journal._reader):
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_writes_that_come_together_share_a_transaction(journal: Journal) -> None:
    seen: list[str] = []
    go = threading.Event()
    journal._writer._connection.set_trace_callback(seen.append)
    journal._writer.order(lambda _: go.wait())
    ones = [prediction(str(i), is_journaled=True) for i in range(20)]

    async def test() -> None:
        writing = asyncio.gather(*map(journal.accepted, ones))
        await asyncio.sleep(0)
        go.set()
        await writing

    asyncio.run(test())
    assert seen.count("COMMIT") <= 2  # the first may have been alone
    assert [each.prediction.id for each in journal.unfinished()] == [one.id for one in ones]


def test_a_write_that_fails_is_heard_of_and_the_next_one_works(journal: Journal) -> None:
    with pytest.raises(JournalError, match="cannot be written: no such table: cats"):
        asyncio.run(journal._writer.write("DELETE FROM cats"))
    accepted(journal, "a")
    assert journal.find("a") is not None


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM cats",  # refused at once
        "INSERT INTO dogs VALUES ('nobody')",  # refused at the end of the transaction
    ],
)
def test_a_write_that_fails_fails_none_beside_it(statement: str, journal: Journal) -> None:
    go, ones = threading.Event(), [prediction(id, is_journaled=True) for id in "abc"]
    db = journal._writer._connection
    db.execute("PRAGMA foreign_keys = ON")
    owner = "owner TEXT REFERENCES predictions (id) DEFERRABLE INITIALLY DEFERRED"
    db.execute(f"CREATE TABLE dogs ({owner})")
    journal._writer.order(lambda _: go.wait())

    async def test() -> list[object]:
        failing = journal._writer.write(statement)
        first, second, last = map(journal.accepted, ones)
        writing = asyncio.gather(first, second, failing, last, return_exceptions=True)
        await asyncio.sleep(0)
        go.set()
        return await writing

    results = asyncio.run(test())
    assert [type(each) for each in results] == [type(None), type(None), JournalError, type(None)]
    assert [each.prediction.id for each in journal.unfinished()] == ["a", "b", "c"]


def test_a_file_that_something_else_holds_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "BUSY_S", 0.01)
    journal = Journal(tmp_path / "j")
    other = sqlite3.connect(tmp_path / "j" / FILE, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(JournalError, match="database is locked"):
        accepted(journal, "a")
    other.execute("ROLLBACK")
    accepted(journal, "a")
    other.close()
    journal.close()


def test_what_is_written_is_off_the_loop_s_thread(journal: Journal) -> None:
    threads: set[str] = set()
    journal._writer._connection.set_trace_callback(
        lambda _: threads.add(threading.current_thread().name)
    )
    (one,) = accepted(journal, "a")
    asyncio.run(journal.tried(one, 1))
    ended(journal, one)
    journal.sweep(0, 0)
    assert threads == {"dmd2-journal"}


def test_pages_are_newest_first_and_lead_to_each_other(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert journal_module.PAGE == 100
    monkeypatch.setattr(journal_module, "PAGE", 5)
    ids = [str(i) for i in range(11)]
    accepted(journal, *ids)

    def page(cursor: str | None) -> tuple[list[str], str | None, str | None]:
        found, newer, older = journal.page(cursor)
        return [each.id for each in found], newer, older

    first, newer, older = page(None)
    assert (first, newer) == (ids[:-6:-1], None)
    second, back, older_still = page(older)
    assert second == ids[5:0:-1]
    third, back_again, end = page(older_still)
    assert (third, end) == (["0"], None)
    assert page(back_again) == (second, back, older_still)
    assert page(back) == (first, None, older)
    accepted(journal, "new")
    assert page(back_again) == (second, back, older_still)
    assert page(back)[1] is not None


def test_an_empty_journal_has_an_empty_page(journal: Journal) -> None:
    assert journal.page(None) == ([], None, None)
    assert journal.page("older-5") == ([], None, None)


@pytest.mark.parametrize(
    "cursor",
    ["", "5", "older-", "older-x", "older--1", "newer-٣", "a-1", "older-9999999999999999999"],
)
def test_a_cursor_of_something_else_is_refused(cursor: str, journal: Journal) -> None:
    with pytest.raises(InvalidRequestError, match=r"cursor: .*none of this list"):
        journal.page(cursor)


def test_what_is_old_loses_inputs_logs_and_outputs_and_stays(
    journal: Journal, tmp_path: Path
) -> None:
    old, young, _ = accepted(journal, "old", "young", "running", prompt="xyzzy")
    old, young = ended(journal, old, age_s=100), ended(journal, young, age_s=10)
    assert journal.sweep(50, 10**9) == 1
    found = journal.find("old")
    assert found is not None
    assert (found.is_removed, found.files, found.inputs) == (True, (), {})
    assert found.outcome is not None
    assert found.outcome.logs == ""
    assert found.outcome.metrics["seeds"] == [7]
    assert (found.status, found.completed_at) == ("succeeded", old.completed_at)
    assert names_in(tmp_path / "j" / "outputs") == sorted(young.files)
    found = journal.find("young")
    assert found is not None
    assert (found.is_removed, found.files) == (False, young.files)
    assert [each.prediction.id for each in journal.unfinished()] == ["running"]
    assert journal.sweep(50, 10**9) == 0


def test_what_was_removed_is_in_no_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    (one,) = accepted(journal, "a", prompt="xyzzy")
    ended(journal, one, age_s=100)
    journal.sweep(50, 10**9)
    journal.close()
    assert b'"seeds"' in bytes_of(tmp_path)
    assert b"xyzzy" not in bytes_of(tmp_path)


def test_outputs_are_bounded_in_bytes_and_the_oldest_go(journal: Journal) -> None:
    ones = [ended(journal, one, age_s=5 - i) for i, one in enumerate(accepted(journal, *"abcde"))]
    each = journal.outputs.num_bytes(ones[0].files)
    assert journal.sweep(50, 3 * each) == 2
    assert [one.id for one in journal.page(None)[0] if not one.is_removed] == ["e", "d", "c"]
    assert journal.sweep(50, 3 * each) == 0


def test_rows_are_bounded_and_the_oldest_go(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MAX_REMOVED_ROWS", 2)
    ones = accepted(journal, *"abcde")
    for one in ones[:4]:
        ended(journal, one, age_s=100)
    journal.sweep(50, 10**9)
    assert [one.id for one in journal.page(None)[0]] == ["e", "d", "c"]
    accepted(journal, "f")
    assert [one.id for one in journal.page(None)[0]] == ["f", "e", "d", "c"]


def test_an_id_can_be_used_again_and_has_no_files_of_before(
    journal: Journal, tmp_path: Path
) -> None:
    first, _ = accepted(journal, "a", "b")
    ended(journal, first)
    accepted(journal, "a")
    assert [each.prediction.id for each in journal.unfinished()] == ["b", "a"]
    found = journal.find("a")
    assert found is not None
    assert (found.status, found.files, found.completed_at) == ("starting", (), None)
    assert names_in(tmp_path / "j" / "outputs") == []


def test_the_next_start_deletes_files_that_nobody_names(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    (one,) = accepted(journal, "a")
    one = ended(journal, one)
    asyncio.run(journal.outputs.keep(answer_to(work("b")).outputs))
    journal.close()
    journal = Journal(tmp_path / "j")
    assert names_in(tmp_path / "j" / "outputs") == list(one.files)
    journal.close()


def test_who_was_not_told_is_known_after_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    ones = [prediction(id, is_journaled=True) for id in "abc"]
    for one in ones[:2]:
        one.webhook = Webhook("https://x.org/hook?job=7")
    for one in ones:
        asyncio.run(journal.accepted(one))
    assert journal.untold() == []
    for one in ones:
        ended(journal, one)
    asyncio.run(journal.told(ones[0]))
    again = replace(ones[1], created_at=ones[1].created_at + timedelta(seconds=1))
    asyncio.run(journal.told(again))  # of an earlier one of its id, say
    journal.close()
    journal = Journal(tmp_path / "j")
    assert [(each.id, each.webhook) for each in journal.untold()] == [("b", ones[1].webhook)]
    assert [known.webhook for id in "ab" if (known := journal.find(id))] == [None, ones[1].webhook]
    journal.close()


def test_the_janitor_sweeps_again_after_an_error_until_it_is_closed() -> None:
    sweeps: list[int] = []

    def sweep() -> int:
        sweeps.append(1)
        raise JournalError("the disk is away")

    janitor = JournalJanitor(sweep, every_s=0.001)
    while len(sweeps) < 3:
        time.sleep(0.001)
    janitor.close()
    num_sweeps = len(sweeps)
    time.sleep(0.01)
    assert len(sweeps) == num_sweeps


def test_a_journal_sweeps_by_its_own_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps: list[object] = []

    class Janitor:
        def __init__(self, sweep: object) -> None:
            sweeps.append(sweep)

        def close(self) -> None: ...

    monkeypatch.setattr(journal_module, "JournalJanitor", Janitor)
    journal = Journal(tmp_path / "j", keep_outputs_s=50, max_output_bytes=10**9)
    old, young = accepted(journal, "old", "young")
    ended(journal, old, age_s=100)
    ended(journal, young, age_s=10)
    (sweep,) = sweeps
    assert sweep() == 1  # type: ignore[operator]
    journal.close()
    journal = Journal(tmp_path / "j", keep_outputs_s=50, max_output_bytes=1)
    assert sweeps[1]() == 1  # type: ignore[operator]
    journal.close()
