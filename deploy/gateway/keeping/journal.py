"""What must outlive the gateway: predictions that were accepted, and what became of them.

A prediction is written before its client hears that it was accepted, before each try, and at its
end. So a gateway that dies, or whose machine does, finds at its next start what is unfinished; and
a request that ends the very process that the gateway runs in is not tried for ever.

Nothing here holds a token, nor of a LoRA's URL a user, a query or a fragment, where such are
hidden. A webhook's URL is kept as it is until its receiver has heard of the end. The inputs, logs
and outputs of what is over go at an age, and the row stays; of such rows the newest
MAX_REMOVED_ROWS stay.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.gateway.keeping.journal_file import (
    FILE,
    JournalError,
    connected,
    locked,
    opened,
    private_folder,
)
from deploy.gateway.keeping.journal_janitor import JournalJanitor
from deploy.gateway.keeping.journal_rows import (
    accepted_columns,
    finished_columns,
    prediction_of,
    tried_columns,
)
from deploy.gateway.keeping.journal_writer import JournalWriter
from deploy.gateway.keeping.kept_work import KeptWork
from deploy.gateway.keeping.outputs import Outputs
from deploy.gateway.prediction import Prediction
from dmd2.errors import InvalidRequestError
from dmd2.server import health
from dmd2.settings import Settings

MAX_REMOVED_ROWS = 100_000
PAGE = 100
# Those that are too old, and of the rest those whose outputs, with all newer ones, are too much.
_TOO_MUCH = """
SELECT place, files FROM (
    SELECT place, files, completed_at,
        sum(num_bytes) OVER (ORDER BY completed_at DESC, place DESC) AS total
    FROM predictions WHERE completed_at IS NOT NULL AND is_removed = 0
) WHERE completed_at < ? OR total > ?
"""
_REMOVE = """
UPDATE predictions SET is_removed = 1, inputs = '{}', logs = '""', files = '[]', num_bytes = 0
WHERE place = ?
"""
_FORGET = """
DELETE FROM predictions WHERE is_removed = 1 AND place <= (
    SELECT place FROM predictions WHERE is_removed = 1 ORDER BY place DESC LIMIT 1 OFFSET ?
)
"""


@dataclass(frozen=True)
class Unfinished:
    """A prediction that an earlier gateway accepted, and the work that is left of it."""

    prediction: Prediction
    work: KeptWork


class Journal:
    """A folder of one gateway: its predictions in SQLite, their outputs beside it.

    What is written is on the disk when the call returns, and written off the caller's thread. What
    is read comes from the caller's, within a millisecond or two.

    Args:
        folder: of no other gateway, that its owner alone may enter; made where there is none.
        keep_outputs_s: so long after its end a prediction has its inputs, logs and outputs.
        max_output_bytes: that outputs may take together; None is half of what the disk has free.

    Attributes:
        outputs: the files.
        folder: where all of it is.

    Raises:
        JournalError: the folder is another gateway's, or open to others, or holds what is no
            journal of this version.
    """

    def __init__(
        self,
        folder: Path,
        keep_outputs_s: float = Settings.keep_outputs_s,
        max_output_bytes: int | None = None,
    ) -> None:
        private_folder(folder)
        self.folder = folder
        self._lock = locked(folder)
        try:
            connection = opened(folder / FILE)
        except JournalError:
            os.close(self._lock)
            raise
        self._writer = JournalWriter(connection)
        self._reader = connected(folder / FILE)
        self.outputs = Outputs(folder / "outputs")
        self.outputs.remove_all_but(self._names_of_files())
        max_bytes = max_output_bytes or health.space_for_outputs(folder)
        self._janitor = JournalJanitor(lambda: self.sweep(keep_outputs_s, max_bytes))

    async def accepted(self, prediction: Prediction) -> None:
        """Have its id stand for it alone: one of the same id that is over goes.

        A new one is written, with its end if that has come already; of one that is not journaled
        nothing is.
        """
        columns = accepted_columns(prediction) if prediction.is_journaled else None
        order = self._writer.order(lambda db: _replaced(db, prediction.id, columns))
        self.outputs.remove(await asyncio.wrap_future(order))

    async def tried(self, prediction: Prediction, num_attempts: int) -> None:
        """Write that it is about to be given to an engine.

        Args:
            prediction: the one.
            num_attempts: that it has had if the gateway ends meanwhile.
        """
        columns = tried_columns(prediction) | {"num_attempts": num_attempts}
        await self._update(prediction.id, columns)

    async def finished(self, prediction: Prediction) -> None:
        """Write how it ended. Its outputs' files are on the disk by now."""
        num_bytes = self.outputs.num_bytes(prediction.files)
        await self._update(prediction.id, finished_columns(prediction) | {"num_bytes": num_bytes})

    async def told(self, prediction: Prediction) -> None:
        """Write that its webhook has heard of the end, or never will.

        Another prediction may have its id by now, which this does not touch.
        """
        statement = (
            "UPDATE predictions SET is_told = 1, webhook = NULL WHERE id = ? AND created_at = ?"
        )
        await self._writer.write(statement, prediction.id, prediction.created_at.timestamp())

    def unfinished(self) -> list[Unfinished]:
        """Those that have no end, in the order of acceptance."""
        rows = self._rows("WHERE completed_at IS NULL ORDER BY place")
        return [Unfinished(prediction_of(row), KeptWork(**json.loads(row["work"]))) for row in rows]

    def untold(self) -> list[Prediction]:
        """Those that are over and whose webhook has not heard of it, in the order of acceptance."""
        where = "WHERE webhook IS NOT NULL AND is_told = 0 AND completed_at IS NOT NULL"
        return [prediction_of(row) for row in self._rows(f"{where} ORDER BY place")]

    def find(self, id: str) -> Prediction | None:
        """The one of this id; what is over has its outputs in files."""
        rows = self._rows("WHERE id = ?", id)
        return prediction_of(rows[0]) if rows else None

    def page(self, cursor: str | None) -> tuple[list[Prediction], str | None, str | None]:
        """At most PAGE of them, newest first, and the cursors of those newer and older.

        Raises:
            InvalidRequestError: the cursor is none that this gave.
        """
        side, place = _read_cursor(cursor)
        if side == "newer":
            rows = self._rows("WHERE place > ? ORDER BY place LIMIT ?", place, PAGE)[::-1]
        elif side == "older":
            rows = self._rows("WHERE place < ? ORDER BY place DESC LIMIT ?", place, PAGE)
        else:
            rows = self._rows("ORDER BY place DESC LIMIT ?", PAGE)
        if not rows:
            return [], None, None
        first, last = rows[0]["place"], rows[-1]["place"]
        newer = f"newer-{first}" if self._rows("WHERE place > ? LIMIT 1", first) else None
        older = f"older-{last}" if self._rows("WHERE place < ? LIMIT 1", last) else None
        return [prediction_of(row) for row in rows], newer, older

    def sweep(self, keep_outputs_s: float, max_bytes: int) -> int:
        """Remove what is too old, and what of the oldest is too much; how many files went.

        Args:
            keep_outputs_s: so long after its end a prediction has its inputs, logs and outputs.
            max_bytes: that outputs may take together.
        """
        names = self._writer.order(lambda db: _removed(db, keep_outputs_s, max_bytes)).result()
        self.outputs.remove(names)
        return len(names)

    def close(self) -> None:
        """Write what is yet to be written, and let another gateway have the folder."""
        self._janitor.close()
        self.outputs.close()
        self._writer.close()
        self._reader.close()
        os.close(self._lock)

    def _names_of_files(self) -> set[str]:
        return {
            name for row in self._rows("WHERE num_bytes > 0") for name in json.loads(row["files"])
        }

    async def _update(self, id: str, columns: Mapping[str, Any]) -> None:
        changes = ", ".join(f"{name} = ?" for name in columns)
        statement = f"UPDATE predictions SET {changes} WHERE id = ?"
        await self._writer.write(statement, *columns.values(), id)

    def _rows(self, rest: str, *values: Any) -> list[sqlite3.Row]:
        try:
            return self._reader.execute(f"SELECT * FROM predictions {rest}", values).fetchall()
        except sqlite3.Error as error:
            raise JournalError(f"the journal cannot be read: {error}") from error


def _replaced(db: sqlite3.Connection, id: str, columns: Mapping[str, Any] | None) -> list[str]:
    """Delete the row of an id, and insert another if there is one; the files of the first."""
    found = db.execute("DELETE FROM predictions WHERE id = ? RETURNING files", (id,)).fetchall()
    if columns is not None:
        names, places = ", ".join(columns), ", ".join("?" * len(columns))
        statement = f"INSERT INTO predictions ({names}) VALUES ({places})"
        db.execute(statement, tuple(columns.values()))
    return [name for row in found for name in json.loads(row["files"])]


def _removed(db: sqlite3.Connection, keep_outputs_s: float, max_bytes: int) -> list[str]:
    """Mark rows as removed, and delete the oldest of those; the files of those that were marked."""
    found = db.execute(_TOO_MUCH, (time.time() - keep_outputs_s, max_bytes)).fetchall()
    for row in found:
        db.execute(_REMOVE, (row["place"],))
    db.execute(_FORGET, (MAX_REMOVED_ROWS,))
    return [name for row in found for name in json.loads(row["files"])]


def _read_cursor(cursor: str | None) -> tuple[str, int]:
    if cursor is None:
        return "", 0
    side, _, place = cursor.partition("-")
    if side in ("newer", "older") and place.isascii() and place.isdigit() and len(place) < 19:
        return side, int(place)
    remedy = "Use one that an answer gave, or leave it out"
    raise InvalidRequestError("cursor", cursor, "it is none of this list", remedy)
