"""Reads a request's JSON as Cog's server does: as strictly, and in the same order.

A body is read from its begin to the first thing that is wrong with it. What is no JSON is
unreadable; what is JSON and not what a field holds is no request. Of fields that are known none may
come twice; in those that are not known, nothing needs to make sense.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Deeper values Cog's server does not read either; the body itself counts as one.
_MAX_DEPTH = 127
_SPACE = re.compile(r"[ \t\n\r]*")
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]|[\udc80-\udcff]")
_OPENING = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)


class UnreadableError(ValueError):
    """The body is no JSON."""


class NoRequestError(ValueError):
    """The body is JSON, and a field of it is not what it must be."""


def read_request(body: bytes, fields: Mapping[str, Callable[[Reader], Any]]) -> dict[str, Any]:
    """The fields of a body that are there.

    Args:
        body: as it was sent.
        fields: what reads each field that is known, such as Reader.value.

    Raises:
        UnreadableError: it is no JSON.
        NoRequestError: it is no object, or a field is not as it must be.
    """
    # What is not UTF-8 is found where it stands in the way: by then it is half a surrogate pair.
    reader = Reader(body.decode(errors="surrogateescape"))
    found: dict[str, Any] = {}
    for name in reader.members("the request"):
        if name in found:
            raise NoRequestError(f"duplicate field `{name}`")
        if (read := fields.get(name)) is None:
            reader.skip()
        else:
            found[name] = read(reader)
    reader.end()
    return found


class Reader:
    """A place in a JSON text, from which the next value is read."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def value(self) -> Any:
        """Whatever is next, if it is UTF-8, not too deep, and its numbers are finite."""
        began = self._at
        value = self._decode(_STRICT)
        read = self._text[began : self._at]
        if _HALF_PAIR.search(read):
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise self._unreadable("it is not UTF-8, or half of a surrogate pair") from None
        if _is_too_deep(read):
            raise self._unreadable("recursion limit exceeded")
        return value

    def skip(self) -> None:
        """Pass over whatever is next; its numbers may be beyond what a double holds."""
        self._decode(_LENIENT)

    def text_or_null(self) -> str | None:
        """The next value, which must be text or null."""
        return None if self._peek() == "n" and self.value() is None else self.text()

    def text(self) -> str:
        """The next value, which must be text."""
        value = self._scalar("a string")
        if not isinstance(value, str):
            raise NoRequestError(f"invalid type: {json.dumps(value)}, expected a string")
        return value

    def texts(self) -> dict[str, str]:
        """The next value, which must be an object whose values are text."""
        return {name: self.text() for name in self.members("a map")}

    def choices(self, allowed: tuple[str, ...]) -> list[str]:
        """The next value, which must be a list of some of the texts allowed."""
        if self._peek() != "[":
            self._scalar("a sequence")
            raise NoRequestError("invalid type, expected a sequence")
        chosen: list[str] = []
        for _ in self._items("[", "]"):
            if self._peek() != '"':
                raise self._unreadable("expected value")
            chosen.append(self.text())
            if chosen[-1] not in allowed:
                said = ", ".join(f"`{each}`" for each in allowed)
                raise NoRequestError(f"unknown variant `{chosen[-1]}`, expected one of {said}")
        return chosen

    def members(self, expected: str) -> Iterator[str]:
        """The names in the object that is next; whoever takes one reads its value."""
        if self._peek() != "{":
            self._scalar(expected)
            raise NoRequestError(f"invalid type, expected {expected}")
        for _ in self._items("{", "}"):
            if self._peek() != '"':
                raise self._unreadable("key must be a string")
            name = self.value()
            self._expect(":")
            yield name

    def end(self) -> None:
        """See that nothing follows."""
        if self._peek():
            raise self._unreadable("trailing characters")

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        """Stand before each item in turn; whoever takes the turn reads it."""
        self._expect(opening)
        if self._peek() == closing:
            self._expect(closing)
            return
        while True:
            yield
            if self._peek() == closing:
                self._expect(closing)
                return
            self._expect(",")

    def _scalar(self, expected: str) -> Any:
        """The next value, which must be neither object nor list."""
        if (found := {"[": "sequence", "{": "map"}.get(self._peek())) is not None:
            raise NoRequestError(f"invalid type: {found}, expected {expected}")
        return self.value()

    def _decode(self, decoder: json.JSONDecoder) -> Any:
        self._peek()
        try:
            value, self._at = decoder.raw_decode(self._text, self._at)
        except RecursionError:
            raise self._unreadable("recursion limit exceeded") from None
        except json.JSONDecodeError as error:
            self._at = error.pos
            raise self._unreadable(error.msg) from None
        except ValueError as error:
            raise self._unreadable(str(error)) from None
        return value

    def _peek(self) -> str:
        """The next character that is no space; "" at the end."""
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()
        return self._text[self._at : self._at + 1]

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise self._unreadable(f"expected `{character}`")
        self._at += 1

    def _unreadable(self, why: str) -> UnreadableError:
        return UnreadableError(f"{why} at character {self._at}")


def _is_too_deep(text: str) -> bool:
    """Whether a value, inside a body, has more lists and objects in each other than may be."""
    if text.count("[") + text.count("{") < _MAX_DEPTH:
        return False
    depth = deepest = 0
    for token in _OPENING.finditer(text):
        depth += bool(token[1]) - bool(token[2])
        deepest = max(deepest, depth)
    return deepest >= _MAX_DEPTH


def _finite(text: str) -> float:
    if abs(number := float(text)) > sys.float_info.max:
        raise ValueError("number out of range")
    return number


def _finite_whole(text: str) -> int | float:
    """What does not fit into 64 bits is a double, as it is for Cog's server."""
    double, whole = _finite(text), int(text)
    return whole if -(2**63) <= whole < 2**64 else double


def _constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


_STRICT = json.JSONDecoder(parse_float=_finite, parse_int=_finite_whole, parse_constant=_constant)
_LENIENT = json.JSONDecoder(parse_int=float, parse_constant=_constant)
