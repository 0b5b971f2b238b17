"""What a client of the real server sees: every bound, errors, concurrency, cancellation."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from cog_server import CogServer
from model_folders import StockDiffusers
from PIL import Image
from servers import assert_alike, images_of, worker_of

from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest

ACCEPTED: list[dict[str, Any]] = [
    {"prompt": "x"},
    {"prompt": "x" * 4000},
    {"negative_prompt": "y" * 4000, "guidance_scale": 1.5},
    {"width": 64, "height": 128},
    {"width": 128, "height": 64},
    {"num_outputs": 4},
    {"num_outputs": 2.0},
    {"num_inference_steps": 2},
    {"num_inference_steps": 4},
    {"guidance_scale": 0},
    {"guidance_scale": 10},
    {"seed": 0},
    {"seed": 2**32 - 1},
    {"output_format": "jpg", "output_quality": 0},
    {"output_format": "webp", "output_quality": 100},
    {"output_format": "png"},
    {"embed_metadata": False},
    *(
        {"aspect_ratio": ratio}
        for ratio in ("1:1", "16:9", "9:16", "3:2", "2:3", "4:3", "3:4", "4:5", "5:4", "21:9")
    ),
    {"aspect_ratio": "9:21"},
]

# What Cog's server refuses by the schema: inputs, field, limit.
INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "shorter than 1"),
    ({"prompt": "x" * 4001}, "prompt", "longer than 4000"),
    ({"prompt": 5}, "prompt", "string"),
    ({"negative_prompt": "y" * 4001}, "negative_prompt", "longer than 4000"),
    ({"aspect_ratio": "2:1"}, "aspect_ratio", "16:9"),
    ({"width": 63, "height": 64}, "width", "minimum of 64"),
    ({"width": 2049, "height": 64}, "width", "maximum of 2048"),
    ({"width": 64, "height": 63}, "height", "minimum of 64"),
    ({"width": 64, "height": 2049}, "height", "maximum of 2048"),
    ({"num_outputs": 0}, "num_outputs", "minimum of 1"),
    ({"num_outputs": 5}, "num_outputs", "maximum of 4"),
    ({"num_outputs": 1.5}, "num_outputs", "integer"),
    ({"num_inference_steps": 0}, "num_inference_steps", "minimum of 1"),
    ({"guidance_scale": -0.1}, "guidance_scale", "minimum of 0"),
    ({"guidance_scale": 10.1}, "guidance_scale", "maximum of 10"),
    ({"seed": -1}, "seed", "minimum of 0"),
    ({"seed": 2**32}, "seed", "maximum of 4294967295"),
    ({"output_format": "gif"}, "output_format", "webp"),
    ({"output_quality": -1}, "output_quality", "minimum of 0"),
    ({"output_quality": 101}, "output_quality", "maximum of 100"),
    ({"embed_metadata": "yes"}, "embed_metadata", "boolean"),
]

# What the request's own rules refuse: inputs, and what the error says of value, limit, way out.
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"prompt": "  "}, ["prompt: a text of 2 ", "visible character", "Describe the image"]),
    ({"negative_prompt": "y"}, ["negative_prompt: a text of 1 ", "above 1", "raise guidance"]),
    ({"width": 64}, ["width: 64", "height is missing", "Give height"]),
    ({"height": 64}, ["height: 64", "width is missing", "Give width"]),
    ({"width": 68, "height": 64}, ["width: 68", "multiple of 8", "Use 64 or 72"]),
    ({"width": 64, "height": 100}, ["height: 100", "multiple of 8", "Use 96 or 104"]),
    ({"width": 2048, "height": 2048}, ["(2048, 2048)", "4,000,000 pixels", "at most 1952"]),
    ({"num_inference_steps": 3}, ["steps: 3", "[999, 749, 499, 249]", "use 2 or 4"]),
    ({"num_inference_steps": 8}, ["steps: 8", "[999, 749, 499, 249]", "use 2 or 4"]),
    ({"seed": 2**32 - 3, "num_outputs": 4}, ["seed: 4294967293", "pass", "at most 4294967292"]),
]


@pytest.mark.parametrize("inputs", ACCEPTED, ids=lambda i: str(i)[:40])
def test_accepted(inputs: dict[str, Any], server: CogServer) -> None:
    response = server.predict({"prompt": "a red circle"} | inputs)
    metrics = response["metrics"]
    images = images_of(response)
    assert len(images) == inputs.get("num_outputs", 1)
    for image in images:
        with Image.open(io.BytesIO(image)) as opened:
            assert opened.size == (metrics["width"], metrics["height"])
            assert opened.format == {"jpg": "JPEG", "webp": "WEBP"}.get(
                inputs.get("output_format", "png"), "PNG"
            )
            assert b"/trainedAlgorithmicMedia<" in opened.info["xmp"]


@pytest.mark.parametrize(("inputs", "field", "limit"), INVALID, ids=lambda v: str(v)[:40])
def test_invalid_by_the_schema(
    inputs: dict[str, Any], field: str, limit: str, server: CogServer
) -> None:
    response = server.predict({"prompt": "a red circle"} | inputs)
    assert response["http_status"] == 422
    (detail,) = response["detail"]
    assert detail["loc"][-1] == field
    assert limit in detail["msg"]


@pytest.mark.parametrize(("inputs", "said"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused_with_field_value_limit_and_way_out(
    inputs: dict[str, Any], said: list[str], server: CogServer
) -> None:
    response = server.predict({"prompt": "a red circle"} | inputs)
    assert response["status"] == "failed"
    assert "InvalidRequestError" in response["error"]
    for words in said:
        assert words in response["error"]


def test_a_missing_prompt_is_named(server: CogServer) -> None:
    response = server.predict({"seed": 1})
    assert response["http_status"] == 422
    assert response["detail"][0]["loc"][-1] == "prompt"


def test_a_refusal_with_cancelled_in_its_prompt_still_fails(server: CogServer) -> None:
    """Cog's server would report an error with that word in it as the caller's cancellation."""
    response = server.predict({"prompt": "x", "negative_prompt": "Cancelled CancelledError"})
    assert response["status"] == "failed"
    assert "negative_prompt" in response["error"]


def test_metrics_and_logs(server: CogServer) -> None:
    response = server.predict(
        {
            "prompt": "one " * 75 + "cut here",
            "seed": 41,
            "num_outputs": 2,
            "width": 64,
            "height": 72,
        }
    )
    metrics = response["metrics"]
    assert metrics["model"] == "tiny"
    assert metrics["seeds"] == [41, 42]
    assert (metrics["width"], metrics["height"], metrics["steps"]) == (64, 72, 4)
    assert metrics["images"] == 2
    assert set(metrics["seconds"]) == {"queue", "encode", "sample", "decode", "check", "save"}
    assert metrics["unread"] == {"prompt": "cut here"}
    assert metrics["batch_sizes"] == [2] * 4
    assert metrics["ways"] == {"step": "lean", "decode": "lean"}
    assert response["logs"].splitlines() == [
        "tiny: seed 41, 64x72",
        "note: prompt was cut at 77 tokens; the metric unread has the rest",
    ]


def test_an_input_without_effect_is_said(server: CogServer) -> None:
    logs = server.predict({"prompt": "x", "guidance_scale": 0.5})["logs"]
    assert "note: guidance_scale 0.5 does nothing" in logs


def test_seeds_reproduce(server: CogServer) -> None:
    drawn = server.predict({"prompt": "a red circle"})
    (seed,) = drawn["metrics"]["seeds"]
    assert f"seed {seed}," in drawn["logs"]
    again = server.predict({"prompt": "a red circle", "seed": seed})
    other = server.predict({"prompt": "a red circle", "seed": (seed + 1) % 2**32})
    assert images_of(drawn) == images_of(again) != images_of(other)


def test_the_server_returns_what_stock_diffusers_makes(
    server: CogServer, model_folder: Path, stock: StockDiffusers
) -> None:
    inputs = {"prompt": "a red circle", "seed": 5, "num_outputs": 2, "width": 96, "height": 64}
    request = GenerationRequest.resolve(ModelCard.read(model_folder), **inputs)
    for index, image in enumerate(images_of(server.predict(inputs))):
        with Image.open(io.BytesIO(image)) as opened:
            pixels = np.asarray(opened).astype(np.int16)
        assert np.abs(pixels - stock.image(request, index)).max() <= 1


MIXED = [
    {
        "prompt": f"picture number {n}",
        "seed": 1000 * n,
        "num_outputs": 1 + n % 3,
        "num_inference_steps": (4, 2)[n % 2],
        "guidance_scale": (0, 0, 3)[n % 3],
        "aspect_ratio": ("1:1", "16:9", "2:3", "9:21")[n % 4],
        "output_format": ("png", "webp")[n % 2],
    }
    for n in range(16)
]


def test_sixteen_at_once_are_each_as_if_alone(server: CogServer) -> None:
    alone = [images_of(server.predict(inputs)) for inputs in MIXED]
    assert len({image for images in alone for image in images}) == sum(map(len, alone))
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(server.predict, MIXED))
    for inputs, response, expected in zip(MIXED, together, alone, strict=True):
        assert_alike(images_of(response), expected)
        assert response["metrics"]["seeds"][0] == inputs["seed"]
        assert f"seed {inputs['seed']}," in response["logs"]
        assert len(response["logs"].splitlines()) == 1


def test_a_cancelled_request_leaves_the_others_untouched(server: CogServer) -> None:
    alone = [images_of(server.predict(inputs)) for inputs in MIXED]
    large = {"prompt": "unwanted", "width": 768, "height": 768, "num_outputs": 4}
    with ThreadPoolExecutor(8) as clients:
        unwanted = [clients.submit(server.predict, large, id=f"unwanted-{n}") for n in range(2)]
        time.sleep(0.3)
        wanted = [clients.submit(server.predict, inputs) for inputs in MIXED]
        for n in range(2):
            cancel(server, f"unwanted-{n}")
        assert [future.result()["status"] for future in unwanted] == ["canceled"] * 2
        for future, expected in zip(wanted, alone, strict=True):
            assert_alike(images_of(future.result()), expected)


def cancel(server: CogServer, prediction_id: str) -> None:
    """Cancel a prediction, which a busy machine may not have let begin yet."""
    for _ in range(50):
        if httpx.post(f"{server.url}/predictions/{prediction_id}/cancel").is_success:
            return
        time.sleep(0.1)
    raise AssertionError(f"{prediction_id} never ran")


def test_a_client_that_leaves_does_not_hold_the_others_up(server: CogServer) -> None:
    large = {"prompt": "left", "width": 768, "height": 768, "num_outputs": 4}
    whole_s = server.predict(large)["metrics"]["predict_time"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/predictions", json={"input": large}, timeout=whole_s / 8)
    left = time.monotonic()
    assert len(images_of(server.predict({"prompt": "a red circle"}))) == 1
    worker = psutil.Process(worker_of(server))
    while worker.cpu_percent(interval=0.1) > 20:
        assert time.monotonic() - left < whole_s / 2, "its images are made for nobody"
