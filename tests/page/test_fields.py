"""The server's schema as a form, and the form as a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cog_schema import build_schema
from page.fake_server import PNG, data_url, schema

from deploy.page.fields import Field, fields_of, form_values, inputs_of
from dmd2.settings import ROOT


@pytest.fixture(scope="module")
def ours() -> list[Field]:
    fields, others = fields_of(build_schema((ROOT / "predict.py").read_text()))
    assert others == []
    return fields


def named(fields: list[Field], name: str) -> Field:
    return next(field for field in fields if field.name == name)


def test_every_input_of_the_predictor_has_a_field(ours: list[Field]) -> None:
    properties = build_schema((ROOT / "predict.py").read_text())["components"]["schemas"]["Input"]
    assert [field.name for field in ours] == list(properties["properties"])
    assert [field.name for field in ours if field.is_required] == ["prompt"]
    assert {field.name for field in ours if field.kind == "secret"} == {
        "hf_api_token",
        "civitai_api_token",
    }
    assert named(ours, "aspect_ratio").choices[:2] == ("1:1", "16:9")
    assert named(ours, "embed_metadata").kind == "toggle"


def test_a_hint_has_the_description_the_bounds_and_the_default(ours: list[Field]) -> None:
    assert named(ours, "output_quality").hint.endswith("100 is best · 0 to 100 · default 90")
    assert named(ours, "seed").hint.endswith("0 to 4294967295 · may be left empty")
    assert named(ours, "fast_decode").hint.endswith("not installed · off by default")
    assert named(ours, "num_inference_steps").hint.endswith("at least 1 · may be left empty")
    assert named(ours, "extra_lora_scale").label == "Extra LoRA scale"
    assert named(ours, "num_outputs").label == "Number of outputs"


def test_an_input_that_nobody_knew_appears_in_its_order() -> None:
    described = schema(
        prompt={"type": "string", "x-order": 0},
        image={"type": "string", "format": "uri", "nullable": True, "x-order": 2},
        strength={"type": "number", "minimum": 0, "maximum": 1, "default": 0.8, "x-order": 1},
        mode={"anyOf": [{"$ref": "#/components/schemas/mode"}, {"type": "null"}], "x-order": 3},
        images={"type": "array", "items": {"type": "string"}, "x-order": 4},
        tiled={"type": "boolean", "nullable": True, "x-order": 5},
    )
    described["components"]["schemas"]["mode"] = {"enum": ["a", "b"], "type": "string"}
    fields, others = fields_of(described)
    assert [(f.name, f.kind) for f in fields] == [
        ("prompt", "text"), ("strength", "number"), ("image", "picture"), ("mode", "choice"),
        ("tiled", "choice"),
    ]  # fmt: skip
    assert others == ["images"], "it is named, not dropped"
    assert named(fields, "tiled").choices == (True, False), "and left out where nobody chose"
    assert named(fields, "mode").choices == ("a", "b")


def test_a_request_says_what_is_not_the_default(ours: list[Field]) -> None:
    untouched: dict[str, Any] = {field.name: field.default for field in ours}
    assert inputs_of(ours, {**untouched, "prompt": "x"}) == {"prompt": "x"}
    touched = {
        "prompt": "x",
        "seed": "0",  # a seed, not nothing
        "num_outputs": 2.0,
        "guidance_scale": 1.5,
        "width": " 64 ",
        "embed_metadata": False,
        "hf_api_token": "",
        "lora_scale": "-.5",
    }
    inputs = inputs_of(ours, {**untouched, **touched})
    assert inputs == {
        "prompt": "x", "seed": 0, "num_outputs": 2, "guidance_scale": 1.5, "width": 64,
        "embed_metadata": False, "lora_scale": -0.5,
    }  # fmt: skip
    assert isinstance(inputs["num_outputs"], int)


@pytest.mark.parametrize("typed", ["seven", "1.5", "1e3", "nan", "inf", "1_0"])
def test_what_is_no_whole_number_is_left_for_the_server_to_refuse(
    ours: list[Field], typed: str
) -> None:
    """Rounded or dropped it would be another request than the one that was typed."""
    sent = inputs_of(ours, {"prompt": "", "seed": typed})
    assert sent["prompt"] == "", "so is an empty prompt"
    assert sent["seed"] in (typed, 1.5, 1000.0)
    assert not isinstance(sent["seed"], int)


def test_a_large_seed_is_not_rounded(ours: list[Field]) -> None:
    assert inputs_of(ours, {"prompt": "x", "seed": str(2**53 + 1)})["seed"] == 2**53 + 1


def test_a_picture_goes_along_byte_for_byte(tmp_path: Path) -> None:
    fields, _ = fields_of(
        schema(prompt={"type": "string"}, image={"type": "string", "format": "uri"})
    )
    (tmp_path / "my picture.png").write_bytes(PNG)
    values = {"prompt": "x", "image": str(tmp_path / "my picture.png")}
    assert inputs_of(fields, values)["image"] == data_url()
    assert "image" not in inputs_of(fields, {"prompt": "x", "image": None})


def test_secrets_are_sent_and_not_remembered(ours: list[Field]) -> None:
    values = {"prompt": "x", "hf_api_token": "hf_secret"}
    assert inputs_of(ours, values)["hf_api_token"] == "hf_secret"
    assert "hf_secret" not in str(form_values(ours, values))
