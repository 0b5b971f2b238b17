"""GenerationRequest's rules, each bound from both sides, and that predict.py says the same."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from cog_schema import build_schema

from dmd2.errors import InvalidRequestError
from dmd2.loras.sources import MAX_CHARS
from dmd2.model_card import ModelCard
from dmd2.request.files import OUTPUT_FORMATS
from dmd2.request.generation_request import GenerationRequest, input_names
from dmd2.request.lora_rules import MAX_LORA_SCALE, MIN_LORA_SCALE, LoraInputs
from dmd2.request.size import ASPECT_RATIOS, MAX_PIXELS, SizeInputs
from dmd2.settings import ROOT

SDXL = ModelCard("sdxl-4step", {4: (999, 749, 499, 249), 2: (999, 499)}, (1024, 1024))
SMALL = ModelCard("small", {4: (999, 749, 499, 249)}, (128, 128))

ALLOWED: list[dict[str, Any]] = [
    {"prompt": "x"},
    {"prompt": "x" * 4000},
    {"prompt": "قطة 🐱 \u202eright to left\ttab"},
    {"negative_prompt": "y" * 4000, "guidance_scale": 1.01},
    {"width": 256, "height": 256},
    {"width": 2048, "height": 1952},
    {"width": 1952, "height": 2048},
    {"num_outputs": 1},
    {"num_outputs": 4},
    {"num_outputs": 2.0},
    {"num_inference_steps": 2},
    {"num_inference_steps": 4.0},
    {"guidance_scale": 0},
    {"guidance_scale": 10},
    {"seed": 0},
    {"seed": 2**32 - 1},
    {"seed": 2**32 - 4, "num_outputs": 4},
    {"output_quality": 0},
    {"output_quality": 100},
    *({"output_format": name} for name in OUTPUT_FORMATS),
    *({"aspect_ratio": name} for name in ASPECT_RATIOS),
]

# inputs, the field that the error names, what its limit says, what its remedy says
REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    ({"prompt": ""}, "prompt", "visible", "Describe"),
    ({"prompt": " \t\n\u3000"}, "prompt", "visible", "Describe"),
    ({"prompt": "x" * 4001}, "prompt", "4000", "Shorten"),
    ({"prompt": "a\0b"}, "prompt", "NUL", "Remove"),
    ({"prompt": "a\ud800b"}, "prompt", "surrogate", "Remove"),
    ({"prompt": 5}, "prompt", "text", "string"),
    ({"negative_prompt": "y"}, "negative_prompt", "guidance_scale above 1", "raise guidance"),
    (
        {"negative_prompt": "y", "guidance_scale": 1},
        "negative_prompt",
        "guidance_scale above 1",
        "raise guidance",
    ),
    (
        {"negative_prompt": "y" * 4001, "guidance_scale": 2},
        "negative_prompt",
        "4000",
        "Shorten",
    ),
    ({"width": 512}, "width", "height is missing", "Give height"),
    ({"height": 512}, "height", "width is missing", "Give width"),
    ({"width": 248, "height": 1024}, "width", "256 to 2048", "256 to 2048"),
    ({"width": 1024, "height": 248}, "height", "256 to 2048", "256 to 2048"),
    ({"width": 2056, "height": 1024}, "width", "256 to 2048", "256 to 2048"),
    ({"width": 1024, "height": 2056}, "height", "256 to 2048", "256 to 2048"),
    ({"width": 1020, "height": 1024}, "width", "multiple of 8", "1016 or 1024"),
    ({"width": 1024, "height": 1025}, "height", "multiple of 8", "1024 or 1032"),
    ({"width": 2048, "height": 1960}, "width, height", "4,000,000", "at most 1952"),
    ({"num_outputs": 0}, "num_outputs", "1 to 4", "1 to 4"),
    ({"num_outputs": 5}, "num_outputs", "1 to 4", "1 to 4"),
    ({"num_outputs": 1.5}, "num_outputs", "whole", "1 or 2"),
    ({"num_outputs": True}, "num_outputs", "number", "1 to 4"),
    ({"num_outputs": "2"}, "num_outputs", "number", "1 to 4"),
    ({"num_outputs": 10**400}, "num_outputs", "1 to 4", "1 to 4"),
    ({"num_inference_steps": 3}, "num_inference_steps", "[999, 749, 499, 249]", "2 or 4"),
    ({"num_inference_steps": 8}, "num_inference_steps", "[999, 749, 499, 249]", "2 or 4"),
    ({"num_inference_steps": 0}, "num_inference_steps", "[999, 749, 499, 249]", "2 or 4"),
    ({"guidance_scale": -0.1}, "guidance_scale", "0 to 10", "0 to 10"),
    ({"guidance_scale": 10.1}, "guidance_scale", "0 to 10", "0 to 10"),
    ({"guidance_scale": float("nan")}, "guidance_scale", "0 to 10", "0 to 10"),
    ({"guidance_scale": float("inf")}, "guidance_scale", "0 to 10", "0 to 10"),
    ({"seed": -1}, "seed", "0 to 4294967295", "0 to 4294967295"),
    ({"seed": 2**32}, "seed", "0 to 4294967295", "0 to 4294967295"),
    ({"seed": 2**32 - 3, "num_outputs": 4}, "seed", "last image", "at most 4294967292"),
    ({"output_quality": -1}, "output_quality", "0 to 100", "0 to 100"),
    ({"output_quality": 101}, "output_quality", "0 to 100", "0 to 100"),
    ({"output_format": "gif"}, "output_format", "png, jpg, webp", "Choose"),
    ({"aspect_ratio": "2:1"}, "aspect_ratio", "16:9", "Choose"),
]


@pytest.mark.parametrize("inputs", ALLOWED, ids=lambda i: str(i)[:40])
def test_allowed(inputs: dict[str, Any]) -> None:
    request = GenerationRequest.resolve(SDXL, **{"prompt": "x"} | inputs)
    for field, value in inputs.items():
        assert settled(request, field) == value


def settled(request: GenerationRequest, name: str) -> Any:
    """What an input has become, in whichever group it is."""
    groups = (request, request.size, request.files)
    return next(getattr(group, name) for group in groups if hasattr(group, name))


@pytest.mark.parametrize(("inputs", "field", "limit", "remedy"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused(inputs: dict[str, Any], field: str, limit: str, remedy: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest.resolve(SDXL, **{"prompt": "x"} | inputs)
    error = caught.value
    assert error.field == field
    assert limit in error.limit
    assert remedy in error.remedy
    assert str(error).startswith(f"{field}: ")
    assert error.limit in str(error)
    assert error.remedy in str(error)
    assert len(str(error)) < 400
    str(error).encode()


def test_community_practice_is_taken_and_said_to_be_that() -> None:
    eight = (999, 874, 749, 624, 499, 374, 249, 124)
    card = ModelCard("mine", {4: (999, 749, 499, 249)}, (1024, 1024), community_steps={8: eight})
    assert GenerationRequest.resolve(card, prompt="x").num_inference_steps == 4
    request = GenerationRequest.resolve(card, prompt="x", num_inference_steps=8)
    assert request.timesteps == eight
    assert request.notes == ("8 steps are community practice: mine was not trained for them",)
    with pytest.raises(InvalidRequestError) as caught:
        GenerationRequest.resolve(card, prompt="x", num_inference_steps=6)
    assert caught.value.limit == (
        "mine was distilled for 4 (at [999, 749, 499, 249]) only; 8 (at [999, 874, 749, 624, 499, "
        "374, 249, 124]) is community practice, not trained"
    )
    assert caught.value.remedy == "Leave it out, or use 4 or 8"


def test_the_rules_hold_for_a_request_that_is_made_directly() -> None:
    with pytest.raises(InvalidRequestError, match="multiple of 8"):
        GenerationRequest(SDXL, "x", 4, seed=1, size=SizeInputs(width=1001, height=1024))


def test_what_is_none_is_as_good_as_left_out() -> None:
    left_out = GenerationRequest.resolve(SDXL, prompt="x", seed=1)
    none = dict.fromkeys(input_names() - {"prompt", "seed"})
    assert GenerationRequest.resolve(SDXL, prompt="x", seed=1, **none) == left_out
    with pytest.raises(InvalidRequestError, match="visible character"):
        GenerationRequest.resolve(SDXL, prompt=None)


@pytest.mark.parametrize("name", ["sede", "files", "notes", "default_steps"])
def test_an_unknown_input_is_refused_without_its_value(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"'{name}' .* no such input.*Use .*width") as no:
        GenerationRequest.resolve(SDXL, prompt="x", **{name: "a secret"})
    assert "secret" not in str(no.value)


@pytest.mark.parametrize(("ratio", "size"), ASPECT_RATIOS.items())
def test_aspect_ratios(ratio: str, size: tuple[int, int]) -> None:
    request = GenerationRequest.resolve(SDXL, prompt="x", aspect_ratio=ratio)
    assert (request.width, request.height) == size
    assert 0.92 <= request.width * request.height / 1024**2 <= 1.0
    small = GenerationRequest.resolve(SMALL, prompt="x", aspect_ratio=ratio)
    assert (small.width, small.height) == (size[0] // 8, size[1] // 8)


def test_the_least_side_is_a_quarter_of_the_models_own() -> None:
    GenerationRequest.resolve(SMALL, prompt="x", width=64, height=64)
    large = ModelCard("large", SMALL.timesteps, (512, 1024))
    GenerationRequest.resolve(large, prompt="x", width=128, height=256)
    for width, height in ((120, 256), (128, 248)):
        with pytest.raises(InvalidRequestError):
            GenerationRequest.resolve(large, prompt="x", width=width, height=height)


def test_a_least_side_that_is_no_multiple_of_8_is_rounded_up() -> None:
    card = ModelCard("odd", SMALL.timesteps, (264, 264))
    GenerationRequest.resolve(card, prompt="x", width=72, height=72)
    with pytest.raises(InvalidRequestError, match="from 72 to 2048"):
        GenerationRequest.resolve(card, prompt="x", width=67, height=72)


@pytest.mark.parametrize(
    ("default_size", "ratio", "said"),
    [
        ((2048, 2048), "21:9", "width: 3072 .* from 512 to 2048"),
        ((2048, 2048), "1:1", "4,000,000 pixels"),
        ((512, 64), "9:21", "width: 112 .* from 128"),
    ],
)
def test_a_size_that_a_model_implies_keeps_the_limits_too(
    default_size: tuple[int, int], ratio: str, said: str
) -> None:
    card = ModelCard("large", SMALL.timesteps, default_size)
    with pytest.raises(InvalidRequestError, match=said):
        GenerationRequest.resolve(card, prompt="x", aspect_ratio=ratio)


def test_requests_of_one_size_are_equal_however_it_was_asked_for() -> None:
    one, other = (
        GenerationRequest.resolve(SDXL, prompt="x", seed=1, **size)
        for size in ({}, {"width": 1024, "height": 1024.0})
    )
    assert one == other


def test_one_step_models_run_one_step() -> None:
    card = ModelCard("sdxl-1step", {1: (399,)}, (1024, 1024))
    assert GenerationRequest.resolve(card, prompt="x").timesteps == (399,)
    with pytest.raises(InvalidRequestError, match=r"1 \(at \[399\]\) only"):
        GenerationRequest.resolve(card, prompt="x", num_inference_steps=4)


def test_seeds() -> None:
    drawn = {GenerationRequest.resolve(SDXL, prompt="x").seed for _ in range(200)}
    assert len(drawn) == 200
    assert max(drawn) > 2**31
    assert GenerationRequest.resolve(SDXL, prompt="x", seed=0, num_outputs=3).seeds == [0, 1, 2]


def test_inputs_without_effect_are_noted() -> None:
    def notes(**inputs: Any) -> str:
        return " ".join(GenerationRequest.resolve(SDXL, prompt="x", **inputs).notes)

    assert notes() == ""
    assert "guidance_scale 0.5" in notes(guidance_scale=0.5)
    assert "aspect_ratio 16:9" in notes(aspect_ratio="16:9", width=512, height=512)
    assert "output_quality" in notes(output_quality=80)
    assert notes(output_quality=80, output_format="jpg") == ""


def schema_inputs() -> tuple[dict[str, Any], dict[str, Any]]:
    schemas = build_schema((ROOT / "predict.py").read_text())["components"]["schemas"]
    return schemas["Input"]["properties"], schemas


def test_predict_py_has_the_same_inputs_and_defaults() -> None:
    properties, _ = schema_inputs()
    request = GenerationRequest.resolve(SDXL, prompt="x")
    loras = LoraInputs()
    settled_by_the_model = {"aspect_ratio", "width", "height", "num_inference_steps", "seed"}
    of_loras = {each.name for each in fields(LoraInputs)}
    assert set(properties) == input_names() | of_loras
    nullable = settled_by_the_model - {"aspect_ratio"} | {
        "lora_scale", "extra_lora_scale", "hf_api_token", "civitai_api_token",
    }  # fmt: skip
    for name, schema in properties.items():
        if name not in settled_by_the_model | nullable | {"prompt"}:
            default = getattr(loras, name) if name in of_loras else settled(request, name)
            assert schema["default"] == default, name
    assert {n for n in properties if properties[n].get("nullable")} == nullable
    secret = {"format": "password", "writeOnly": True, "x-cog-secret": True}
    for name in ("hf_api_token", "civitai_api_token"):
        assert secret.items() <= properties[name].items(), "as Cog itself writes it"
    assert all("\n" not in p["description"] and p["description"] for p in properties.values())


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("num_outputs", 1, 4),
        ("guidance_scale", 0, 10),
        ("seed", 0, 2**32 - 1),
        ("output_quality", 0, 100),
        ("width", 64, 2048),
        ("height", 64, 2048),
    ],
)
def test_predict_py_has_the_same_bounds(name: str, low: int, high: int) -> None:
    properties, _ = schema_inputs()
    assert (properties[name]["minimum"], properties[name]["maximum"]) == (low, high)
    other = {"width": {"height": 1024}, "height": {"width": 1024}}.get(name, {})
    card = ModelCard("tiny", {4: (999, 749, 499, 249)}, (64, 64))
    for value, allowed in ((low, True), (high, True), (low - 1, False), (high + 1, False)):
        inputs = {"prompt": "x", name: value, **other}
        if allowed:
            GenerationRequest.resolve(card, **inputs)
        else:
            with pytest.raises(InvalidRequestError):
                GenerationRequest.resolve(card, **inputs)


def test_predict_py_has_the_same_bounds_for_loras() -> None:
    properties, _ = schema_inputs()
    for name in ("lora_scale", "extra_lora_scale"):
        bounds = (properties[name]["minimum"], properties[name]["maximum"])
        assert bounds == (MIN_LORA_SCALE, MAX_LORA_SCALE)
    for name in ("lora_weights", "extra_lora"):
        assert properties[name]["maxLength"] == MAX_CHARS


def test_predict_py_has_the_same_choices_and_lengths() -> None:
    properties, schemas = schema_inputs()
    assert schemas["aspect_ratio"]["enum"] == list(ASPECT_RATIOS)
    assert schemas["output_format"]["enum"] == list(OUTPUT_FORMATS)
    assert (properties["prompt"]["minLength"], properties["prompt"]["maxLength"]) == (1, 4000)
    assert properties["negative_prompt"]["maxLength"] == 4000
    assert MAX_PIXELS < 2048 * 2048, "the pixel limit would never bind"
