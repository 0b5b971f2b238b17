"""What Replicate's dialect reads of a request beside its path."""

from __future__ import annotations

import hmac
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from deploy.gateway.dialects.contract import MAX_BODY_BYTES, BodyTooLargeError, is_json, read_body
from deploy.gateway.dialects.replicate_bodies import wait_asked
from deploy.gateway.dialects.replicate_problems import InvalidField, Problem, invalid

# A client whose patience ends at the very moment of the answer would ask for the same again.
_EARLY = 1 / 60


def check_token(request: Request, token: str) -> None:
    """Raise Problem where a request does not bear the token; without one, all may ask."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    is_right = hmac.compare_digest(given.strip().encode("latin-1"), token.encode())
    if token and not (scheme.lower() in ("bearer", "token") and is_right):
        said = (
            "The request bears no token, or another one. Send Authorization: Bearer, and the token."
        )
        raise Problem(401, "Unauthenticated", said)


def hold_s(request: Request) -> float | None:
    """For how long to wait for the end before the answer; None for not at all.

    Raises:
        Problem: a header asks for what cannot be.
    """
    if "Cancel-After" in request.headers:
        raise invalid([InvalidField("Cancel-After", "it is not known here; cancel by request")])
    try:
        asked_s = wait_asked(request.headers.get("Prefer", ""))
    except ValueError as error:
        raise invalid([InvalidField("Prefer", str(error))]) from None
    return None if asked_s is None else asked_s * (1 - _EARLY)


async def json_body(request: Request) -> dict[str, Any]:
    """The body, a JSON object.

    It must say that it is JSON: a page of another site can have a browser send any other kind.

    Raises:
        Problem: it is none, or too long.
    """
    if not is_json(request.headers.get("Content-Type", "")):
        said = "Send the body with Content-Type: application/json."
        raise Problem(415, "Unsupported media type", said)
    try:
        body = json.loads(await read_body(request))
    except BodyTooLargeError:
        said = f"The body has more than {MAX_BODY_BYTES} bytes."
        raise Problem(413, "Body too large", said) from None
    except (ValueError, RecursionError, ClientDisconnect):
        raise Problem(400, "Bad request", "The body is no JSON.") from None
    if not isinstance(body, dict):
        raise Problem(400, "Bad request", "The body is no JSON object.")
    return body
