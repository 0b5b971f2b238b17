"""The rules that a single input can break, each with an error that shows the way out."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

from dmd2.errors import InvalidRequestError

MAX_PROMPT_CHARS = 4000
# Unicode's categories of control and format characters, and of spaces.
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")


def integer(field: str, value: object, low: int, high: int) -> int:
    """The value as an int; a whole float (JSON's 2.0) counts as one, a bool does not."""
    given = number(field, value, low, high)
    if given != int(given):
        raise InvalidRequestError(
            field, value, "it must be a whole number", f"Use {int(given)} or {int(given) + 1}"
        )
    return int(given)


def number(field: str, value: object, low: float, high: float) -> float:
    """The value, if it is a number from low to high."""
    limit, remedy = f"it must be from {low:g} to {high:g}", f"Use a number from {low:g} to {high:g}"
    if isinstance(low, int):
        limit = limit.replace(f"{high:g}", str(high))
        remedy = f"Use a whole number from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(field, value, "it must be a number", remedy)
    if not low <= value <= high:  # also refuses NaN
        raise InvalidRequestError(field, value, limit, remedy)
    return value


def settle(inputs: object, field: str, rule: Callable[..., Any], low: float, high: float) -> None:
    """Put an input of a frozen dataclass through integer or number, while it is being made."""
    object.__setattr__(inputs, field, rule(field, getattr(inputs, field), low, high))


def check_text(field: str, value: object) -> None:
    """Refuse what is no text, or too long, or cannot be stored."""
    if not isinstance(value, str):
        raise InvalidRequestError(field, value, "it must be text", "Send a string")
    if len(value) > MAX_PROMPT_CHARS:
        raise InvalidRequestError(
            field,
            value,
            f"it may have at most {MAX_PROMPT_CHARS} characters and has {len(value)}",
            "Shorten it; the text encoders read about 75 words at most",
        )
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise InvalidRequestError(
            field,
            value,
            "it holds a NUL or half of a surrogate pair, which no file or tokenizer can store",
            "Remove that character",
        )


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        listed = ", ".join(choices)
        raise InvalidRequestError(field, value, f"it must be one of {listed}", "Choose one of them")


def has_visible_character(text: str) -> bool:
    """Whether anything but space, control and format characters is in a text."""
    return any(unicodedata.category(c) not in _INVISIBLE for c in text)
