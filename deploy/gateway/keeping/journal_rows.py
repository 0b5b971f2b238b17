"""Predictions as rows of the journal, and rows as predictions."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from deploy.gateway.keeping.kept_work import KeptWork, shown_inputs
from deploy.gateway.prediction import Prediction, Webhook
from deploy.gateway.work import Outcome


def accepted_columns(prediction: Prediction) -> dict[str, Any]:
    """What is written of a new one, and of its end where that has come already."""
    work = None if prediction.work is None else json.dumps(asdict(KeptWork.of(prediction.work)))
    columns = {
        "id": prediction.id,
        "dialect": prediction.dialect,
        "model": prediction.model,
        "version": prediction.version,
        "inputs": json.dumps(shown_inputs(prediction.inputs)),
        "work": work,
        "webhook": _written_webhook(prediction.webhook),
        "created_at": prediction.created_at.timestamp(),
        "status": prediction.status,
        "num_attempts": prediction.num_attempts,
    }
    return columns | (finished_columns(prediction) if prediction.is_over else {})


def tried_columns(prediction: Prediction) -> dict[str, Any]:
    """What is written before a try."""
    return {
        "num_attempts": prediction.num_attempts,
        "status": prediction.status,
        "started_at": _seconds(prediction.started_at),
    }


def finished_columns(prediction: Prediction) -> dict[str, Any]:
    """What is written at the end; the work is of no use any more."""
    assert prediction.outcome is not None
    return tried_columns(prediction) | {
        "completed_at": _seconds(prediction.completed_at),
        "error": json.dumps(prediction.outcome.error),
        "logs": json.dumps(prediction.outcome.logs),
        "metrics": json.dumps(dict(prediction.outcome.metrics)),
        "files": json.dumps(prediction.files),
        "work": None,
    }


def prediction_of(row: sqlite3.Row) -> Prediction:
    """The prediction of a row; its work, if it has some left, is not made."""
    prediction = Prediction(
        id=row["id"],
        dialect=row["dialect"],
        inputs=json.loads(row["inputs"]),
        work=None,
        model=row["model"],
        version=row["version"],
        webhook=_read_webhook(row["webhook"]),
        is_journaled=True,
        created_at=datetime.fromtimestamp(row["created_at"], UTC),
        started_at=_time(row["started_at"]),
        completed_at=_time(row["completed_at"]),
        status=row["status"],
        files=tuple(json.loads(row["files"])),
        is_removed=bool(row["is_removed"]),
        num_attempts=row["num_attempts"],
    )
    if prediction.is_over:
        error, logs, metrics = (json.loads(row[name]) for name in ("error", "logs", "metrics"))
        prediction.outcome = Outcome((), error, logs, metrics)
        prediction.ended.set()
    return prediction


def _written_webhook(webhook: Webhook | None) -> str | None:
    return None if webhook is None else json.dumps(asdict(webhook))


def _read_webhook(written: str | None) -> Webhook | None:
    if written is None:
        return None
    said = json.loads(written)
    return Webhook(said["url"], tuple(said["events"]))


def _seconds(time: datetime | None) -> float | None:
    return None if time is None else time.timestamp()


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
