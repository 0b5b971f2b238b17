"""Replicate's objects: predictions, models, versions. No I/O.

The fields are those that the official clients read (Python replicate 1.0.7 and 2.0.0b4, JavaScript
replicate 1.4.0) and https://replicate.com/docs/reference/http describes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from deploy.gateway.prediction import Event, Prediction
from dmd2 import __version__
from dmd2.model_card import ModelCard

DEFAULT_EVENTS: tuple[Event, ...] = ("output", "completed")
MAX_WAIT_S = 60
DEFAULT_OWNER = "dmd2"
ACCOUNT = {"type": "organization", "username": DEFAULT_OWNER, "name": "DMD2 gateway"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_WAIT = re.compile(r"wait(?:\s*=\s*\"?([0-9]{1,9})\"?)?")


@dataclass(frozen=True)
class ServedModel:
    """The one model that a gateway has, as Replicate's dialect shows it.

    Attributes:
        card: of the model.
        schema: the OpenAPI document of its inputs.
        cog_version: of Cog, that the schema is in the form of.
        serves: the owner/name that it answers to; empty for all.
        since: when this gateway began to serve it.
    """

    card: ModelCard
    schema: Mapping[str, Any]
    cog_version: str
    serves: tuple[str, ...] = ()
    since: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def name(self) -> str:
        """What it is called where a request names none: owner/name."""
        if self.serves:
            return self.serves[0]
        return f"{DEFAULT_OWNER}/{re.sub(r'[^A-Za-z0-9._-]+', '-', self.card.name)}"

    @property
    def version(self) -> str:
        """Of the only version, 64 hexadecimal digits.

        Another model, or another version of this code, has another one; another machine or start
        does not.
        """
        card = self.card
        said = [
            card.name,
            sorted(card.timesteps.items()),
            sorted(card.community_steps.items()),
            card.default_size,
            card.license,
            __version__,
        ]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def answers_to(self, owner: str, name: str) -> bool:
        """Whether requests may call it so."""
        if not _NAME.fullmatch(owner) or not _NAME.fullmatch(name):
            return False
        return not self.serves or f"{owner}/{name}" in self.serves

    def named_by(self, version: str) -> str | None:
        """What a request's `version` calls the model; None where that is no version of it.

        Args:
            version: the version's id, owner/name, or owner/name:id.
        """
        if version == self.version:
            return self.name
        model, _, id = version.partition(":")
        owner, _, name = model.partition("/")
        is_known = id in ("", self.version) and self.answers_to(owner, name)
        return model if is_known else None

    def version_object(self) -> dict[str, Any]:
        """The only version."""
        return {
            "id": self.version,
            "created_at": _time(self.since),
            "cog_version": self.cog_version,
            "openapi_schema": self.schema,
        }

    def model_object(self, owner: str, name: str, base_url: str, run_count: int) -> dict[str, Any]:
        """The model, by a name that it answers to."""
        return {
            "url": f"{base_url}/v1/models/{owner}/{name}",
            "owner": owner,
            "name": name,
            "description": f"{self.card.name}, served by a gateway of DMD2",
            "visibility": "private",
            "is_official": False,
            "github_url": None,
            "paper_url": None,
            "license_url": None,
            "run_count": run_count,
            "cover_image_url": None,
            "default_example": None,
            "latest_version": self.version_object(),
        }


def prediction_object(
    prediction: Prediction, served: ServedModel, base_url: str, is_just_created: bool = False
) -> dict[str, Any]:
    """A prediction but for its output.

    Args:
        prediction: the one.
        served: the model.
        base_url: what URLs begin with.
        is_just_created: whether this answers the request that created it. Such an answer says
            "starting" until the end, since all clients take "processing" for an end.
    """
    outcome = prediction.outcome
    is_hidden = is_just_created and not prediction.is_over
    url = f"{base_url}/v1/predictions/{prediction.id}"
    return {
        "id": prediction.id,
        "model": prediction.model or served.name,
        "version": prediction.version or served.version,
        "input": dict(prediction.inputs),
        "logs": "" if outcome is None else outcome.logs,
        "error": None if outcome is None else outcome.error,
        "status": "starting" if is_hidden else prediction.status,
        "metrics": _metrics(prediction),
        "created_at": _time(prediction.created_at),
        "started_at": None if is_hidden else _time(prediction.started_at),
        "completed_at": _time(prediction.completed_at),
        "data_removed": prediction.is_removed,
        "source": "api",
        "urls": {"get": url, "cancel": f"{url}/cancel", "web": url},
    }


def written(said: Mapping[str, Any], outputs: Sequence[bytes] | None) -> bytes:
    """A prediction's object as JSON, with its output.

    Put together from bytes: megabytes of base64 need no escaping.

    Args:
        said: the object.
        outputs: URLs of images, in ASCII; None for none.
    """
    head = json.dumps(said).encode()[:-1]
    if outputs is None:
        return head + b', "output": null}'
    return head + b', "output": [' + b", ".join(b'"%s"' % url for url in outputs) + b"]}"


def wait_asked(prefer: str) -> int | None:
    """For how many seconds a Prefer header asks to wait for the end, 1 to 60; None for none.

    Raises:
        ValueError: it asks for less or more.
    """
    for preference in prefer.split(","):
        if found := _WAIT.fullmatch(preference.strip()):
            wait_s = MAX_WAIT_S if found[1] is None else int(found[1])
            if not 1 <= wait_s <= MAX_WAIT_S:
                raise ValueError(f"wait={wait_s} is not allowed: it must be 1 to {MAX_WAIT_S}")
            return wait_s
    return None


def _metrics(prediction: Prediction) -> dict[str, Any]:
    if prediction.outcome is None:
        return {}
    metrics = dict(prediction.outcome.metrics)
    if (completed := prediction.completed_at) is not None:
        metrics["total_time"] = (completed - prediction.created_at).total_seconds()
        if prediction.started_at is not None:  # where no engine said it
            predict_time = (completed - prediction.started_at).total_seconds()
            metrics.setdefault("predict_time", predict_time)
    return metrics


def _time(time: datetime | None) -> str | None:
    if time is None:
        return None
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
