"""Bodies are read as Cog's server reads them; each answer here is coglet 0.23.1's own."""

from __future__ import annotations

import pytest

from deploy.gateway import cog_dialect
from deploy.gateway.cog_dialect import Refusal

DEEP = 126
READ = {
    b"{}": {},
    b' {"input" : {"prompt":"x"} }\r\n\t': {"input": {"prompt": "x"}},
    b'{"input":{"a":1,"a":2}}': {"input": {"a": 2}},
    b'{"id":null,"webhook":null,"input":null}': {"id": None, "webhook": None, "input": None},
    b'{"context":{"a":"b","a":"c"}}': {"context": {"a": "c"}},
    b'{"webhook_events_filter":["start","start"]}': {"webhook_events_filter": ["start", "start"]},
    b'{"webhook_events_filter":[]}': {"webhook_events_filter": []},
    b'{"x":1e400,"y":"\\ud800","z":[[{}]],"v":1' + b"0" * 400 + b"}": {},
    b'{"x":1,"x":2}': {},
    b'{"x":"\xff","input":1}': {"input": 1},
    '{"input":"é"}'.encode(): {"input": "é"},
    b'{"input":"\\ud83d\\ude00"}': {"input": "\U0001f600"},
    b'{"input":' + b"[" * DEEP + b"]" * DEEP + b"}": None,
    b'{"input":"' + b"[" * 200 + b'"}': {"input": "[" * 200},
    b'{"input":[' + b"[]," * 200 + b"[]]}": {"input": [[]] * 201},
    b'{"input":1e-400}': {"input": 0.0},
    b'{"input":18446744073709551616}': {"input": 2**64},
}
UNREADABLE = (
    b"", b"\0", b"\xef\xbb\xbf{}", b'{"input":{"prompt":"\xff"}}', b'{"\xff":1}',
    b'{"id":"\xff"}', b"\xff{}", b"{}\xff",
    b'{"input":', b"{} {}",
    b'{"input":1,}', b"{,}", b"{5:1}", b'{"input" 1}', b'{"input":NaN}', b'{"x":NaN}',
    b'{"input":-Infinity}', b'{"input":1e400}', b'{"input":1' + b"0" * 400 + b"}",
    b'{"input":00}', b'{"input":1.}', b'{"input":"\\ud800"}', b'{"input":"\\udc00x"}',
    b'{"input":{"\\ud800":1}}', b'{"\\ud800":1}', b'{"input":"a\nb"}', b"\x0b{}", b"{}\x0b",
    b'{"id":nul}', b'{"id":-}', b'{"id":1e400}', b"nul", b"1e400",
    b'{"webhook_events_filter":[5]}', b'{"webhook_events_filter":[,]}',
    b'{"input":' + b"[" * (DEEP + 1) + b"]" * (DEEP + 1) + b"}", b'{"input":' * 10_000,
    b'{"input":1' + b"0" * 5000 + b"}",
)  # fmt: skip
NO_REQUEST = (
    b"null", b"5 x", b"7\xff", b'"x" y', b"true", b"[]", b"[" * 10_000, b'{"id":5,x',
    b'{"id":[', b'{"id":{',
    b'{"id":true}', b'{"webhook":5}', b'{"context":5}', b'{"context":[NaN]}', b'{"context":null}',
    b'{"context":{"a":5,"b":NaN}}', b'{"context":{"a":null}}', b'{"webhook_events_filter":{}}',
    b'{"webhook_events_filter":"x"}', b'{"webhook_events_filter":null}',
    b'{"webhook_events_filter":["x"]}', b'{"id":null,"id":NaN}', b'{"input":1,"input":2}',
)  # fmt: skip


@pytest.mark.parametrize("body", READ, ids=lambda body: str(body[:40]))
def test_what_is_a_request_is_read(body: bytes) -> None:
    expected = READ[body]
    found = cog_dialect.asked_by(body, "application/json")
    assert expected is None or found == expected


@pytest.mark.parametrize("body", UNREADABLE, ids=lambda body: str(body[:40]))
def test_what_is_no_json_is_a_400(body: bytes) -> None:
    with pytest.raises(Refusal) as refusal:
        cog_dialect.asked_by(body, "application/json")
    assert refusal.value.status == 400
    assert refusal.value.content.startswith(b"Failed to parse the request body as JSON: ")
    assert refusal.value.media_type == "text/plain; charset=utf-8"


@pytest.mark.parametrize("body", NO_REQUEST, ids=lambda body: str(body[:40]))
def test_what_is_no_request_is_a_422(body: bytes) -> None:
    with pytest.raises(Refusal) as refusal:
        cog_dialect.asked_by(body, "application/json")
    assert refusal.value.status == 422
    assert refusal.value.content.startswith(b"Failed to deserialize the JSON body into the target")


def test_content_types() -> None:
    for kind in ("application/json", "Application/JSON; charset=x", "application/vnd.api+json"):
        assert cog_dialect.asked_by(b'{"input":1}', kind) == {"input": 1}
    for kind in ("text/json", "application/jsonx", "json", ""):
        with pytest.raises(Refusal) as refusal:
            cog_dialect.asked_by(b'{"input":1}', kind)
        assert refusal.value.status == 415


def test_without_a_content_type_a_body_is_not_looked_at() -> None:
    assert cog_dialect.asked_by(b"garbage", None) == {}
