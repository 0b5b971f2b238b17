"""README's inputs are those of the schema, which Cog's server holds requests to."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from cog_schema import build_schema

from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraInputs
from dmd2.settings import ROOT

README = (ROOT / "README.md").read_text()
SCHEMAS = build_schema((ROOT / "predict.py").read_text())["components"]["schemas"]
INPUTS: dict[str, dict[str, Any]] = SCHEMAS["Input"]["properties"]
# What the schema leaves open, and a rule of LoRAs settles.
SETTLED = {
    scale: LoraInputs("a", extra_lora="b").wanted[lora][1]
    for lora, scale in (("lora_weights", "lora_scale"), ("extra_lora", "extra_lora_scale"))
}


def table() -> list[tuple[str, str, str]]:
    """The rows: names, type and default, rule."""
    section = README.split("\n## Inputs\n\n")[1].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines()[2:]]
    return [(names, default, rule) for names, default, rule in rows]


ROW_OF = {
    name: (default, rule)
    for names, default, rule in table()
    for name in re.findall(r"`(\w+)`", names)
}


def test_every_input_has_its_place() -> None:
    named = [name for names, _, _ in table() for name in re.findall(r"`(\w+)`", names)]
    assert sorted(named) == sorted(INPUTS)


@pytest.mark.parametrize("name", INPUTS)
def test_a_default_is_the_schemas(name: str) -> None:
    cell, default = ROW_OF[name][0], SETTLED.get(name, INPUTS[name].get("default"))
    shown = default if isinstance(default, str) and default else json.dumps(default)
    expected = [] if default is None else [shown.removesuffix(".0")]
    assert re.findall("`(.+?)`", cell) == expected
    assert ("required" in cell) == (name in SCHEMAS["Input"]["required"])


@pytest.mark.parametrize("name", INPUTS)
def test_a_range_is_the_schemas(name: str) -> None:
    rule, schema = ROW_OF[name][1], INPUTS[name]
    low = schema.get("minimum", schema.get("minLength"))
    high = schema.get("maximum", schema.get("maxLength"))
    if low is not None and high is not None:
        assert re.search(rf"(^|\s){low} to {high}\b", rule)
    elif high is not None:
        assert f"at most {high} characters" in rule
    if "allOf" in schema:
        assert f"`{' '.join(SCHEMAS[name]['enum'])}`" in rule


def test_every_request_over_http_is_allowed() -> None:
    bodies = [json.loads(body) for body in re.findall(r"-d '(.+?)'", README, re.DOTALL)]
    assert any("lora_weights" in body["input"] for body in bodies)
    card = ModelCard.read(ROOT / "weights" / "demo")
    for body in bodies:
        assert set(body["input"]) <= set(INPUTS)
        LoraInputs.taken_from(body["input"])
        GenerationRequest.resolve(card, **body["input"])
