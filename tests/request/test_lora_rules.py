"""What a request may say of LoRAs."""

from __future__ import annotations

from typing import Any

import pytest

from dmd2.errors import InvalidRequestError
from dmd2.request.lora_rules import LoraInputs, LoraUse, key_of


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({}, {}),
        ({"lora_weights": "a"}, {"lora_weights": ("a", 1.0)}),
        ({"lora_weights": "a", "lora_scale": -1}, {"lora_weights": ("a", -1.0)}),
        ({"lora_weights": "a", "lora_scale": 0}, {"lora_weights": ("a", 0.0)}),
        (
            {"lora_weights": "a", "extra_lora": "b", "extra_lora_scale": 3},
            {"lora_weights": ("a", 1.0), "extra_lora": ("b", 3.0)},
        ),
    ],
)
def test_what_is_wanted(inputs: dict[str, Any], wanted: dict[str, Any]) -> None:
    given = {**inputs, "prompt": "x", "hf_api_token": None}
    assert LoraInputs.taken_from(given).wanted == wanted
    assert given == {"prompt": "x"}, "the rest is the request's"


@pytest.mark.parametrize(
    ("inputs", "field", "said"),
    [
        ({"extra_lora": "b"}, "extra_lora", "lora_weights has no first"),
        ({"lora_scale": 1.0}, "lora_scale", "lora_weights, which is empty"),
        ({"lora_weights": "a", "extra_lora_scale": 0.5}, "extra_lora_scale", "extra_lora, which"),
        ({"lora_weights": "a", "lora_scale": 3.01}, "lora_scale", "from -1 to 3"),
        ({"lora_weights": "a", "lora_scale": -1.01}, "lora_scale", "from -1 to 3"),
        ({"lora_weights": "a", "lora_scale": float("nan")}, "lora_scale", "from -1 to 3"),
        ({"lora_weights": "a", "lora_scale": True}, "lora_scale", "a number"),
        ({"lora_weights": 5}, "lora_weights", "text"),
    ],
)
def test_what_is_refused(inputs: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said) as caught:
        LoraInputs(**inputs)
    assert caught.value.field == field


def test_what_has_no_effect_is_noted() -> None:
    assert LoraInputs("a", 0.0).notes == ("lora_scale 0 leaves nothing of lora_weights",)
    assert "no LoRA is asked for" in LoraInputs(hf_api_token="t").notes[0]
    assert LoraInputs("a", hf_api_token="t").notes == ()


def test_a_token_is_in_no_text_of_the_inputs() -> None:
    assert "hush" not in repr(LoraInputs("a", hf_api_token="hush", civitai_api_token="hush"))


@pytest.mark.parametrize(
    "inputs", [{"extra_lora": "https://x.org/a?key=hush"}, {"lora_weights": "https://hush.org/\0"}]
)
def test_what_a_url_holds_is_in_no_error(inputs: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        LoraInputs(**inputs)
    assert "hush" not in f"{caught.value} {caught.value.value}"


def test_sets_are_told_apart_by_content_and_scale() -> None:
    text = LoraUse("a", "1", 1.0, {"text_encoder": {"w": None}})
    unet = LoraUse("b", "2", 0.5, {"unet": {"w": None}})
    assert key_of([text, unet]) == (("1", 1.0), ("2", 0.5))
    assert key_of([LoraUse("another name", "1", 1.0, {})]) == key_of([text])
