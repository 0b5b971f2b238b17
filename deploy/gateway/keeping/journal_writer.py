"""The thread that writes the journal: whoever waits meanwhile shares the next sync of the disk."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from deploy.gateway.keeping.journal_file import JournalError

# In one transaction. The disk's sync costs the same for one.
_MAX_ORDERS = 256


@dataclass(frozen=True)
class _Order:
    """Statements, which may be run again after a rollback, and who hears that they are written."""

    run: Callable[[sqlite3.Connection], Any]
    done: Future[Any] = field(default_factory=Future)


class JournalWriter:
    """Runs what it is given in order, on its own thread, until closed."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="dmd2-journal", daemon=True)
        self._thread.start()

    async def write(self, statement: str, *values: Any) -> None:
        """Have a statement on the disk when this returns.

        Raises:
            JournalError: it is not.
        """
        await asyncio.wrap_future(self.order(lambda db: db.execute(statement, values)))

    def order(self, run: Callable[[sqlite3.Connection], Any]) -> Future[Any]:
        """What run returns, once all that it wrote is on the disk, or a JournalError."""
        order = _Order(run)
        self._orders.put(order)
        return order.done

    def close(self) -> None:
        """End the thread, once it has written what it was given."""
        self._orders.put(None)
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        is_open = True
        while is_open:
            orders = [self._orders.get()]
            while orders[-1] is not None and len(orders) < _MAX_ORDERS and self._orders.qsize():
                orders.append(self._orders.get())
            is_open = orders[-1] is not None
            wanted = [o for o in orders if o is not None and o.done.set_running_or_notify_cancel()]
            if wanted:
                self._write(wanted)

    def _write(self, orders: list[_Order]) -> None:
        """Run orders in one transaction, or, where that fails, each in one of its own."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:  # something else holds the file, against each of them
            _refuse(orders, error)
            return
        try:
            results = [order.run(self._connection) for order in orders]
            self._connection.execute("COMMIT")
        except Exception as error:  # each order's own waiter hears of it
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if len(orders) == 1:
                _refuse(orders, error)
            else:
                for order in orders:
                    self._write([order])
        else:
            for order, result in zip(orders, results, strict=True):
                order.done.set_result(result)


def _refuse(orders: list[_Order], error: Exception) -> None:
    for order in orders:
        order.done.set_exception(JournalError(f"the journal cannot be written: {error}"))
