"""What inputs must be, by predict.py's own signature."""

from __future__ import annotations

from typing import Any

import pytest
from gateway.fake_engines import CARD
from jsonschema import Draft7Validator

from deploy.gateway.dialects.contract import IDS, Contract
from dmd2.errors import InvalidRequestError

CONTRACT = Contract("eu1")
INPUTS: dict[str, Any] = CONTRACT.schema["components"]["schemas"]["Input"]["properties"]
# What coglet 0.23.1 answers: inputs, and each field's messages.
SAID: list[tuple[Any, list[tuple[str, str]]]] = [
    ({"prompt": ""}, [("prompt", '"" is shorter than 1 character')]),
    ({"prompt": "é" * 4000}, []),
    (
        {"prompt": "x" * 4001},
        [("prompt", '"' + "x" * 4001 + '" is longer than 4000 characters')],
    ),
    (
        {"prompt": ["x"], "seed": -5.5},
        [
            ("prompt", '["x"] is not of type "string"'),
            ("seed", "-5.5 is less than the minimum of 0"),
            ("seed", '-5.5 is not of type "integer"'),
        ],
    ),
    ({"seed": None}, [("seed", 'null is not of type "integer"'), ("prompt", "Field required")]),
    ({"prompt": "x", "seed": 2e19}, [("seed", "2e+19 is greater than the maximum of 4294967295")]),
    (
        {"prompt": "x", "output_format": 5},
        [
            ("output_format", '5 is not one of ["png","jpg","webp"]'),
            ("output_format", '5 is not of type "string"'),
        ],
    ),
    (
        {"prompt": "x", "output_format": 'é\x01"'},
        [("output_format", '"é\\u0001\\"" is not one of ["png","jpg","webp"]')],
    ),
    (
        {"prompt": {"é": 1, "b": [], "a": None}},
        [("prompt", '{"a":null,"b":[],"é":1} is not of type "string"')],
    ),
    ({"prompt": "x", "embed_metadata": 1}, [("embed_metadata", '1 is not of type "boolean"')]),
    ({"prompt": "x", "seed": True}, [("seed", 'true is not of type "integer"')]),
    ({"prompt": "x", "guidance_scale": True}, [("guidance_scale", 'true is not of type "number"')]),
    ({"prompt": "x", "hf_api_token": 5}, [("hf_api_token", '5 is not of type "string"')]),
    ({"prompt": "x", "num_outputs": 2.0, "nothing": 5}, []),
    ([], [("__root__", '[] is not of type "object"')]),
    ({}, [("prompt", "Field required")]),
]


@pytest.mark.parametrize(("inputs", "said"), SAID, ids=lambda value: str(value)[:40])
def test_faults_are_told_as_cogs_server_tells_them(
    inputs: Any, said: list[tuple[str, str]]
) -> None:
    assert [(fault.field, fault.message) for fault in CONTRACT.faults(inputs)] == said


VALUES = (
    None, True, False, 0, 1, -1, 2.0, 2.5, -0.0, 1e308, 5e-324, 2**53 + 1, 2**64, 4294967295,
    4294967296, "", "x", "png", "1:1", "x" * 2001, "x" * 4001, [], {}, [1], {"x": 1}, 64, 63, 2048,
    2049, 10, 10.5, 100, 101, 3, 3.5, -1.5,
)  # fmt: skip


@pytest.mark.parametrize("field", INPUTS)
def test_faults_are_found_where_json_schema_finds_them(field: str) -> None:
    schema = dict(CONTRACT.schema) | INPUTS[field]
    for value in VALUES:
        faults = [f for f in CONTRACT.faults({field: value}) if f.field == field]
        assert bool(faults) != Draft7Validator(schema).is_valid(value), value


def test_each_input_of_the_schema_is_known_to_this_check() -> None:
    words = {"allOf", "title", "type", "default", "description", "nullable", "x-order"}
    words |= {"minimum", "maximum", "minLength", "maxLength", "format", "writeOnly", "x-cog-secret"}
    assert all(set(schema) <= words for schema in INPUTS.values())


def test_work_has_its_seed_and_where_loras_are() -> None:
    given = {"prompt": "x", "lora_weights": "owner/repo", "hf_api_token": "hush", "sede": 5}
    work, known = CONTRACT.work("one", given, CARD)
    assert work.id == "one"
    assert 0 <= work.request.seed < 2**32
    assert work.request.model == CARD
    assert (work.loras.lora_weights, work.loras.hf_api_token) == ("owner/repo", "hush")
    assert known == {name: given[name] for name in ("prompt", "lora_weights", "hf_api_token")}
    assert "hush" not in repr(work)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"prompt": "x", "seed": -1}, "seed: -1 is not allowed: it is less than the minimum of 0"),
        ({}, "prompt: None is not allowed: it is required"),
        ({"prompt": "x", "width": 64}, "width: 64 is not allowed: width and height go together"),
        ({"prompt": "x", "lora_scale": 1}, "lora_scale: 1 is not allowed: it is the strength of"),
    ],
)
def test_what_breaks_a_rule_is_no_work(inputs: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        CONTRACT.work("one", inputs, CARD)


def test_ids_are_many_and_fit_the_rule() -> None:
    ids = {CONTRACT.new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(id.startswith("eu1-") and IDS.fullmatch(id) for id in ids)
    assert all(IDS.fullmatch(Contract("x" * 16).new_id()) for _ in range(10))
