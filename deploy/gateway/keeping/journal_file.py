"""The journal's SQLite file: for one gateway at a time, its owner's eyes only, this version's."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from pathlib import Path

from dmd2.errors import DMD2Error

FILE, LOCK = "journal.sqlite", "lock"
SCHEMA_VERSION = 1
# "dmd2" in ASCII: tells the file from other SQLite files.
APPLICATION_ID = 0x646D6432
BUSY_S = 5.0
# place is the order of acceptance, and is never given twice.
_SCHEMA = f"""
BEGIN;
CREATE TABLE predictions (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    dialect TEXT NOT NULL,
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    inputs TEXT NOT NULL,
    work TEXT,
    webhook TEXT,
    created_at REAL NOT NULL,
    started_at REAL,
    completed_at REAL,
    status TEXT NOT NULL,
    num_attempts INTEGER NOT NULL,
    error TEXT,
    logs TEXT,
    metrics TEXT,
    files TEXT NOT NULL DEFAULT '[]',
    num_bytes INTEGER NOT NULL DEFAULT 0,
    is_removed INTEGER NOT NULL DEFAULT 0,
    is_told INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX unfinished ON predictions (place) WHERE completed_at IS NULL;
CREATE INDEX kept ON predictions (completed_at) WHERE completed_at IS NOT NULL AND is_removed = 0;
CREATE INDEX removed ON predictions (place) WHERE is_removed = 1;
CREATE INDEX untold ON predictions (place) WHERE webhook IS NOT NULL AND is_told = 0;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_ELSEWHERE = "set DMD2_JOURNAL_DIR to another folder"


class JournalError(DMD2Error):
    """The journal cannot be opened, read or written."""


def private_folder(folder: Path) -> None:
    """Make a folder that none but its owner may enter.

    Raises:
        JournalError: it cannot be made, or is there and others may enter it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
    except OSError as error:
        raise JournalError(f"{folder}: {error.strerror}; {_ELSEWHERE}") from error
    if mode & _OTHERS:
        raise JournalError(
            f"{folder} may be entered by others (mode {stat.S_IMODE(mode):04o}), and holds prompts "
            f"and images: run `chmod 700 {folder}`, or name a folder below it that is not there yet"
        )


def locked(folder: Path) -> int:
    """A file descriptor that holds the folder for this gateway, until it is closed.

    Raises:
        JournalError: another gateway holds it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise JournalError(
            f"another gateway uses {folder}, and two would do the same work twice: end that one, "
            f"or {_ELSEWHERE}"
        ) from error
    return descriptor


def opened(path: Path) -> sqlite3.Connection:
    """A connection to a journal, which is made where there is none.

    Raises:
        JournalError: the file is none of this version's, is damaged, or something holds it.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    path.chmod(0o600)  # SQLite gives its other files the mode of this one
    try:
        connection = connected(path)
        try:
            _prepare(path, connection)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise JournalError(
            f"{path} cannot be opened: {error}. Move it away to begin a new one, or {_ELSEWHERE}"
        ) from error
    return connection


def connected(path: Path) -> sqlite3.Connection:
    """A connection whose every statement is on the disk at its end, or at its transaction's."""
    connection = sqlite3.connect(
        path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    connection.row_factory = sqlite3.Row
    return connection


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    """Make a journal of an empty file; raise JournalError where it is another version's."""
    _check(path, connection)
    connection.execute("PRAGMA journal_mode = WAL")
    if _pragma(connection, "user_version") == 0:
        connection.executescript(_SCHEMA)


def _check(path: Path, connection: sqlite3.Connection) -> None:
    """Raise JournalError where the file is not empty and not this version's."""
    version = _pragma(connection, "user_version")
    is_empty = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if version == 0 and is_empty:
        return
    if _pragma(connection, "application_id") != APPLICATION_ID:
        raise JournalError(f"{path} is not a gateway's journal: move it away, or {_ELSEWHERE}")
    if version != SCHEMA_VERSION:
        raise JournalError(
            f"{path} has schema version {version}, and this gateway reads {SCHEMA_VERSION}: let "
            f"the version that wrote it finish what is in it and move it away, or {_ELSEWHERE}"
        )
    problem = str(_pragma(connection, "quick_check(1)")).replace("\n", " ")
    if problem != "ok":
        raise JournalError(f"{path} is damaged ({problem}): move it away, or {_ELSEWHERE}")


def _pragma(connection: sqlite3.Connection, name: str) -> int | str:
    value: int | str = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value
