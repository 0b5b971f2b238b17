"""What Replicate's dialect answers where something is wrong: problem JSON (RFC 9457)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.responses import Response

from dmd2.errors import InvalidRequestError


@dataclass(frozen=True)
class InvalidField:
    """What is wrong with a field of a request.

    Attributes:
        field: its path, such as input.seed.
        description: for a reader.
        type: for a program.
    """

    field: str
    description: str
    type: str = "invalid"


class Problem(Exception):
    """Why a request is not done.

    Attributes:
        status: of HTTP.
        title: the kind of problem.
        detail: this one, and the way out.
        invalid_fields: those to blame.
        retry_after_s: when to try again, in whole seconds; None where that is no help.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        invalid_fields: Sequence[InvalidField] = (),
        retry_after_s: int | None = None,
    ) -> None:
        self.status, self.title, self.detail = status, title, detail
        self.invalid_fields, self.retry_after_s = tuple(invalid_fields), retry_after_s
        super().__init__(detail)

    def response(self) -> Response:
        """The answer that says so."""
        said = {"title": self.title, "detail": self.detail, "status": self.status}
        fields = [vars(each) for each in self.invalid_fields]
        body = said | ({"invalid_fields": fields} if fields else {})
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        content = json.dumps(body).encode()
        return Response(content, self.status, headers, media_type="application/problem+json")


def invalid(fields: Sequence[InvalidField]) -> Problem:
    """A request that breaks rules."""
    detail = "\n".join(f"- {each.field}: {each.description}" for each in fields)
    return Problem(422, "Input validation failed", detail, fields)


def invalid_request(error: InvalidRequestError, within: str = "") -> Problem:
    """The same, of one rule.

    Args:
        error: the rule.
        within: what the field's name lies in, such as "input.".
    """
    said = str(error).removeprefix(f"{error.field}: ")
    return invalid([InvalidField(f"{within}{error.field}", said)])


def not_found(what: str) -> Problem:
    """Something that is not there."""
    return Problem(404, "Not found", f"{what} could not be found.")


def invalid_version(version: str, served: str) -> Problem:
    """A version that nobody has, in Replicate's title for it.

    Args:
        version: that was asked for.
        served: the only one there is.
    """
    shown = version if len(version) <= 100 else f"{version[:100]}..."
    return Problem(
        422,
        "Invalid version or not permitted",
        f"The version {shown!r} does not exist here. The one that does is {served}.",
    )
