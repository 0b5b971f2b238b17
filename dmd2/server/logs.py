"""The server's own log: for whoever runs the server, and never a prompt unless that is asked for.

What is printed within a prediction goes to that prediction's logs, which its caller reads. What is
logged here goes to the server's standard error, with the prediction's id.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from dmd2.settings import LogFormat

_ID_VARIABLE = "_coglet_prediction_id"
_ID = contextvars.ContextVar[str | None]("dmd2_prediction_id", default=None)


def configure(log_format: LogFormat) -> None:
    """Send this process's log records to standard error, as text or as one JSON object a line."""
    handler = _OutsidePredictions(sys.stderr)
    handler.setFormatter(_JSONFormatter() if log_format == "json" else _TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


@contextmanager
def naming(prediction: str) -> Iterator[None]:
    """Have what is logged meanwhile bear a prediction's id, where Cog's server does not say it."""
    token = _ID.set(prediction)
    try:
        yield
    finally:
        _ID.reset(token)


def prediction_id() -> str | None:
    """The id of the prediction that this code runs for, as `naming` or Cog's server knows it."""
    if (named := _ID.get()) is not None:
        return named
    values = (v for var, v in contextvars.copy_context().items() if var.name == _ID_VARIABLE)
    found = next(values, None)
    return None if found is None else str(found)


class _OutsidePredictions(logging.StreamHandler[TextIO]):
    """Writes in an empty context: Cog's server would else take the line for the caller's logs."""

    def emit(self, record: logging.LogRecord) -> None:
        record.prediction = prediction_id()
        contextvars.Context().run(super().emit, record)


class _TextFormatter(logging.Formatter):
    """The message, behind the prediction's id in brackets where there is one.

    Clients choose ids, which could hold what looks like another line.
    """

    def format(self, record: logging.LogRecord) -> str:
        prediction = getattr(record, "prediction", None)
        if prediction is None:
            return super().format(record)
        return f"[{prediction.encode('unicode_escape').decode()}] {super().format(record)}"


class _JSONFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, prediction and traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "prediction": getattr(record, "prediction", None),
            "traceback": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps({key: value for key, value in line.items() if value is not None})
