"""What tests/server/test_hostile.py sends, and what it expects to hear.

What Cog's server itself does badly stands here as it is, behind a comment that begins with "Cog:",
so that a change of it is noticed.
"""

from __future__ import annotations

import json

# Values as they stand in the body. The first ones are no JSON, or no number that a double holds.
NOT_JSON = (
    "1e400", "-1e400", "1" + "0" * 400, "NaN", "Infinity", "-Infinity", "+1", "00", "1.", "0x10",
    "nul", "'x'", '"\\ud800"', '"\\udc00x"', '"\\x41"', '"a\nb"', "", "[" * 10_000 + "]" * 10_000,
    '{"a":' * 10_000 + "1" + "}" * 10_000,
)  # fmt: skip
VALUES = (
    "1e308", "-1e308", "5e-324", "1e-400", "-0.0", "2.0", "2.5", "9007199254740993",
    "9223372036854775808", "18446744073709551616", "-9223372036854775809", "null", "true", "false",
    "0", "1", '"2"', '"true"', '"null"', '""', "[]", "{}", "[1]", '["x"]', '{"x":1}',
    '{"$ref":"#/"}', "[" * 100 + "]" * 100,
)  # fmt: skip

OK = b'{"input":{"prompt":"x","seed":1}}'
JSON = {"content-type": "application/json"}
# A body, its status and what the answer says; "" is for images.
BODIES: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 400, "JSON"),
    "NUL": (b"\0", 400, "JSON"),
    "byte order mark": (b"\xef\xbb\xbf" + OK, 400, "JSON"),
    "UTF-16": (OK.decode().encode("utf-16"), 400, "JSON"),
    "no UTF-8": (b'{"input":{"prompt":"\xff\xfe"}}', 400, "input.prompt"),
    "cut": (OK[:-2], 400, "JSON"),
    "two bodies": (OK + OK, 400, "JSON"),
    "trailing comma": (b'{"input":{"prompt":"x",}}', 400, "JSON"),
    "null": (b"null", 422, "PredictionRequest"),
    "list": (b"[]", 422, "PredictionRequest"),
    "string": (b'"x"', 422, "PredictionRequest"),
    "no input": (b"{}", 422, "prompt"),
    "input null": (b'{"input":null}', 422, "prompt"),
    "input list": (b'{"input":[]}', 422, "object"),
    "input string": (b'{"input":"x"}', 422, "object"),
    "input number": (b'{"input":5}', 422, "object"),
    "input twice": (OK[:-1] + b',"input":{}}', 422, "input"),
    # Cog: the last of two keys counts, and nothing is said.
    "key twice": (b'{"input":{"prompt":5,"prompt":"x"}}', 200, ""),
    "prompt of 100 kB": (json.dumps({"input": {"prompt": "x" * 100_000}}).encode(), 422, "4000"),
    "deep list": (b"[" * 10_000 + b"]" * 10_000, 422, "JSON"),
    "deep object": (b'{"input":' * 10_000 + b"1" + b"}" * 10_000, 400, "JSON"),
    "webhook number": (OK[:-1] + b',"webhook":5}', 422, "webhook"),
    "webhook nonsense": (OK[:-1] + b',"webhook":"nonsense"}', 200, ""),
    "context number": (OK[:-1] + b',"context":5}', 422, "context"),
    "unknown inputs": (b'{"input":{"prompt":"x","self":1,"__class__":{},"":0,"a b":[]}}', 200, ""),
    "unknown beside input": (OK[:-1] + b',"model":"../x","__proto__":{"a":1}}', 200, ""),
    "id number": (OK[:-1] + b',"id":5}', 422, "id"),
    "id list": (OK[:-1] + b',"id":[]}', 422, "id"),
    "id null": (OK[:-1] + b',"id":null}', 200, ""),
    "id surrogate": (OK[:-1] + b',"id":"\\ud800"}', 400, "id"),
}
HEADERS: dict[str, tuple[dict[str, str], int, str]] = {
    **{
        kind: ({"content-type": kind}, 415, "application/json")
        for kind in ("text/plain", "application/xml", "multipart/form-data; boundary=x", "", "x")
    },
    # Cog: without a content type it does not read the body, and misses the prompt.
    "no content type": ({}, 422, "prompt"),
    "foreign charset": ({"content-type": "application/json; charset=utf-16"}, 200, ""),
    "not gzip": (JSON | {"content-encoding": "gzip"}, 200, ""),
    "100 kB": (JSON | {"x-big": "a" * 100_000}, 200, ""),
    "control character": (JSON | {"x-odd": "a\x01b"}, 400, ""),
    "prefer nonsense": (JSON | {"prefer": "wait=-1, respond-sync; \\"}, 200, ""),
    "traceparent": (JSON | {"traceparent": "00-evil"}, 200, ""),
}

# A body and headers that are beyond what Cog's server reads, or nearly: it may take a megabyte of
# headers and may not, as its reads fall.
OVERSIZED: dict[str, tuple[bytes, dict[str, str], set[int]]] = {
    "1 MB of headers": (OK, JSON | {"x-big": "a" * 1_000_000}, {200, 431}),
    "20 MB of headers": (OK, JSON | {"x-big": "a" * 20_000_000}, {431}),
    "body over 100 MiB": (b'{"input":{"prompt":"%s"}}' % (b"x" * (100 << 20)), JSON, {413}),
}

# Prompts, and what a refusal says; "" is for images.
PROMPTS: dict[str, tuple[str, str]] = {
    "canceled": ("cancelled", ""),
    "CancelledError": ("asyncio.CancelledError: Cancelled", ""),
    "format": ("%s%n{0}{__class__}{prompt!r}${HOME}", ""),
    "shell": ("$(touch /tmp/x); `id` | rm -rf / && '\"\\", ""),
    "path": ("../../../etc/passwd\\..\\C:", ""),
    "file": ("file:///etc/passwd", ""),
    "data": ("data:text/plain,hi", ""),
    "bad URL": ("http://[::", ""),
    "markup": ("<script>alert(1)</script><!--]]>", ""),
    "parameters": ("x\nNegative prompt: y\nSteps: 4, Seed: 1, Size: 8x8", ""),
    "special tokens": ("<|endoftext|><|startoftext|>" * 100, ""),
    "control": ("a\x01\x02\x1b[31m\x7f\x85\r\n\t\x0b\x0cb", ""),
    "NUL": ("a\0b", "NUL"),
    "blank": (" \t\r\n\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000", "visible character"),
    "right to left": ("\u202eabc\u202c שלום \u2066سلم\u2069", ""),
    "zero width": ("a\u200bb\u200cc\u2060d\ufeffe\u00adf", ""),
    "combining": ("e" + "\u0301" * 3999, ""),
    "emoji": ("👨\u200d👩\u200d👧\u200d👦🏳️\u200d🌈👍🏽", ""),
    "noncharacters": ("\ufffe\uffff\U0010ffff\ue000\ufffd", ""),
    "one letter": ("a" * 4000, ""),
    "one emoji": ("😀" * 4000, ""),
    "long when composed": ("\ufdfa" * 4000, ""),
    "long in lower case": ("\u0130" * 4000, ""),
    "digits": ("1" * 4000, ""),
    "words": ("a\n" * 2000, ""),
    "spaces": ("x" + " " * 3999, ""),
}
INVISIBLE = ("\u200b", "\u2060\u00ad", "\ufeff", "\x01", "\x7f", "\u202e")

# An id, what an error says, and whether it leads to /tmp/{token}, out of Cog's own folder.
IDS: dict[str, tuple[str, str, bool]] = {
    # Cog: it makes folders wherever the id leads, absolute paths included: see SECURITY.md.
    "up": ("../../{token}/etc/x", "", True),
    "absolute": ("/tmp/{token}/etc/x", "", True),
    "dots": ("{token}/../../../{token}", "", True),
    "below": ("{token}/b/../c", "", False),
    "empty": ("", "", False),
    "dot": (".", "", False),
    "parent": ("..", "", False),
    "percent": ("{token}%2e%2f%zz%", "", False),
    "control": ("{token}\r\nX: 1\x1b[31m", "", False),
    "unicode": ("{token}é☃😀\u202e\u200b", "", False),
    "format": ("{token}%s{{0}}$(id)", "", False),
    # Cog: its error does not name the id.
    "5000 characters": ("{token}" + "x" * 5000, "File name too long", False),
    "NUL": ("{token}\0", "NUL byte", False),
}

HEAD = (
    b"POST /predictions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\n"
)
# What HTTP forbids, and the status where there is one.
MALFORMED: dict[str, tuple[bytes, int | None]] = {
    "garbage": (b"\0\1\2\r\n\r\n", 400),
    "HTTP/3": (b"GET / HTTP/3.0\r\n\r\n", 400),
    "no version": (b"POST /predictions\r\n\r\n", 400),
    "half a header": (HEAD, None),
    "half a body": (HEAD + b"Content-Length: 40\r\n\r\n" + OK[:9], 400),
    "length below zero": (HEAD + b"Content-Length: -1\r\n\r\n", 400),
    "length beyond 64 bits": (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{}", 400),
    "two lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 5\r\n\r\n{}xxx", 400),
    "bad chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", 400),
    "huge chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 18 + b"\r\n{}", 400),
    "NUL in a header": (HEAD + b"X: a\0b\r\nContent-Length: 2\r\n\r\n{}", 400),
    "2000 headers": (HEAD + b"X: y\r\n" * 2000 + b"Content-Length: 2\r\n\r\n{}", 431),
    "long address": (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
}
