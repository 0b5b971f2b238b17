"""Cog's dialect, without HTTP: bodies in and out as coglet 0.23.1 has them.

It differs from coglet in what is listed here, and in nothing else:

- Ids are `[A-Za-z0-9_-]{1,64}`; others are a 422.
- Webhooks go to the hosts of DMD2_WEBHOOK_HOSTS alone; others are a 422.
- There is no POST /shutdown. There are GET /ready and GET /metrics.
- A body of more than 1 MB is a 413.
- Errors lack the words "Prediction failed: Async prediction failed: " before the error's name.
- `metrics` has `attempts`. All others, and logs, come with an engine's answer: a prediction that is
  under way, or was cancelled, has none.
- A body that is a list is a 422, whatever is in it. A field that is not known is a 400 where it is
  nested hundreds deep.
- Of what is hardly HTTP, uvicorn takes some and answers 400 to the rest, where coglet's server has
  words of its own (414, 431).
- A full queue is a 409 with Retry-After. A 503 has that too, but while the first engine starts: the
  gateway is ending, or has had no engine for 30 seconds.
- What an engine's death interrupts is done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.gateway.dialects.contract import IDS, Fault, is_json
from deploy.gateway.dialects.json_body import NoRequestError, Reader, UnreadableError, read_request
from deploy.gateway.prediction import EVENTS, Prediction
from deploy.gateway.work import Outcome
from dmd2.errors import InvalidRequestError

_FIELDS = {
    "id": Reader.text_or_null,
    "input": Reader.value,
    "webhook": Reader.text_or_null,
    "webhook_events_filter": lambda reader: reader.choices(EVENTS),
    "context": Reader.texts,
}
_IDS = "it must be 1 to 64 letters, digits, - and _"
NO_STREAM = "This model does not support streaming responses, and neither does this gateway."
NOT_READY = "Setup has not finished yet. Wait until it has finished, or GET /health-check."


class Refusal(Exception):
    """Why a request is not done.

    Attributes:
        status: of HTTP.
        content: of the answer.
        media_type: of that.
        retry_after_s: when to try again, in whole seconds; None where that is no help.
    """

    def __init__(
        self, status: int, said: str | Mapping[str, Any], retry_after_s: int | None = None
    ) -> None:
        is_text = isinstance(said, str)
        self.status, self.retry_after_s = status, retry_after_s
        self.content = said.encode() if isinstance(said, str) else _json(said)
        self.media_type = "text/plain; charset=utf-8" if is_text else "application/json"
        super().__init__(str(said))


def asked_by(body: bytes, content_type: str | None) -> dict[str, Any]:
    """The fields of a request's body: id, input, webhook, webhook_events_filter, context.

    Without a content type the body is not looked at, as if it were {}.

    Raises:
        Refusal: it is no JSON, or its fields are not as they must be.
    """
    if content_type is None:
        return {}
    if not is_json(content_type):
        raise Refusal(415, "Expected request with `Content-Type: application/json`")
    try:
        return read_request(body, _FIELDS)
    except UnreadableError as error:
        raise Refusal(400, f"Failed to parse the request body as JSON: {error}") from None
    except NoRequestError as error:
        said = "Failed to deserialize the JSON body into the target type"
        raise Refusal(422, f"{said}: {error}") from None


def id_asked(asked: Mapping[str, Any], in_path: str | None) -> str | None:
    """The id that a client gave a prediction, in the path or in the body; None for none.

    Raises:
        Refusal: it is no id, or there are two.
    """
    given = asked.get("id") if in_path is None else in_path
    if given is not None and not IDS.fullmatch(given):
        raise invalid("id", _IDS)
    if in_path is not None and asked.get("id") not in (None, in_path):
        raise invalid("id", "prediction ID must match the ID supplied in the URL")
    return given


def check_inputs(faults: Sequence[Fault]) -> None:
    """Raise Refusal if there is any fault."""
    if faults:
        raise Refusal(422, {"detail": [_detail_of(fault) for fault in faults]})


def invalid(field: str, said: str) -> Refusal:
    """A field beside the inputs breaks a rule."""
    return Refusal(422, {"detail": [_detail(["body", field], said)]})


def unable(status: int, why: str, retry_after_s: int | None = None) -> Refusal:
    """The request may be good, and is not done now."""
    return Refusal(status, {"error": why, "status": "failed"}, retry_after_s)


def refused_outcome(error: InvalidRequestError, seconds: float) -> Outcome:
    """What becomes of inputs that break a rule which their schema does not tell."""
    return Outcome(error=f"{type(error).__name__}: {error}", metrics={"predict_time": seconds})


def state_of(prediction: Prediction) -> bytes:
    """What is said of a prediction under way."""
    return _json({**_said(prediction), "input": dict(prediction.inputs)})


def started(id: str) -> bytes:
    """What is said of one that was accepted, and is not waited for."""
    return _json({"id": id, "status": "starting"})


def body_of(prediction: Prediction, outputs: Sequence[bytes], id: str | None = None) -> bytes:
    """A prediction as an answer or a webhook has it.

    Put together from bytes: megabytes of base64 need no escaping.

    Args:
        prediction: the one.
        outputs: `data:` URLs.
        id: what its client calls it, where that is not its id.
    """
    said = _said(prediction) | ({} if id is None else {"id": id})
    if not outputs:
        return _json(said)
    before = {name: value for name, value in said.items() if name < "output"}
    after = {name: value for name, value in said.items() if name > "output"}
    listed = b",".join(b'"%b"' % url for url in outputs)
    return b"%b,%b" % (_json(before)[:-1], b'"output":[%b],%b' % (listed, _json(after)[1:]))


def _said(prediction: Prediction) -> dict[str, Any]:
    outcome = prediction.outcome or Outcome()
    error = {} if outcome.error is None else {"error": outcome.error}
    return {
        **error,
        "id": prediction.id,
        "logs": outcome.logs,
        "metrics": dict(outcome.metrics),
        "status": prediction.status,
    }


def _detail_of(fault: Fault) -> dict[str, Any]:
    kind = "value_error.missing" if fault.limit is None else "value_error"
    return _detail(["body", "input", fault.field], fault.message, kind)


def _detail(loc: list[str], said: str, kind: str = "value_error") -> dict[str, Any]:
    return {"loc": loc, "msg": said, "type": kind}


def _json(said: Mapping[str, Any]) -> bytes:
    return json.dumps(said, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
