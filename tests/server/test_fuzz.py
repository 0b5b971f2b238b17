"""Random requests through the real server, made from its own OpenAPI document and beyond it.

Of a request's inputs jsonschema says whether that document forbids them, and `broken_rules` which
of the other rules they break; the answer must agree with both. Of bodies that were damaged byte by
byte, or that are no requests at all, only the answer's form is known.

16 are sent at once, 304 in all, or 5,120 with `--full`, which draws another seed each time.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import sys
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from cog_server import CogServer
from fuzz_requests import MAX_PIXELS, Attempt, Document
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from servers import images_of, worker_of

from dmd2.request.input_rules import has_visible_character

BATCH = 16
NUM_BATCHES, NUM_BATCHES_FULL = 19, 320
SEED = 20
LONGEST_S = 120.0
MAX_SEED = 2**32 - 1
KNOWN = {"prompt": "a red circle", "seed": 1}
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


def test_random_requests(server: CogServer, request: pytest.FixtureRequest) -> None:
    is_full = request.config.getoption("--full")
    chosen = secrets.randbelow(2**32) if is_full else SEED
    print(f"seed {chosen}")
    fuzz = Fuzz(server)

    @seed(chosen)
    @settings(
        max_examples=NUM_BATCHES_FULL if is_full else NUM_BATCHES,
        phases=[Phase.generate],  # an error shows the one request that is to blame
        suppress_health_check=list(HealthCheck),
        database=None,
        deadline=None,
    )
    @given(st.lists(fuzz.document.attempts(), min_size=BATCH, max_size=BATCH))
    def send(batch: list[Attempt]) -> None:
        fuzz.send(batch)

    try:
        send()
    finally:
        print(dict(sorted(fuzz.counts.items())))
    for kind in ("succeeded", "failed", "invalid", "unreadable"):
        assert fuzz.counts[kind] > fuzz.counts["sent"] / 50, f"hardly any: {fuzz.counts}"


class Fuzz:
    """A server that is being fuzzed.

    Attributes:
        document: its own, of which the requests are made.
        counts: the requests sent, the answers by outcome, the images, and the 409s.
    """

    def __init__(self, server: CogServer) -> None:
        self._server = server
        self._client = httpx.Client(base_url=server.url, trust_env=False, timeout=LONGEST_S)
        self.document = Document(self._client.get("/openapi.json").json())
        self.counts: Counter[str] = Counter()
        self._worker, self._before = worker_of(server), self._known_pixels()

    def send(self, batch: list[Attempt]) -> None:
        """Send requests together, judge the answers, and see that the server is as it was."""
        with ThreadPoolExecutor(len(batch)) as pool:
            answers = list(pool.map(self._answer, batch))
        for attempt, answer in zip(batch, answers, strict=True):
            try:
                self._judge(attempt, answer)
            except Exception as error:
                told = f"{attempt}\nwas answered {answer.status_code} {answer.text[:2000]}"
                raise AssertionError(f"{told}\n{error!r}") from error
        assert self._server.process.poll() is None
        assert self._server.health()["status"] in ("READY", "BUSY")
        assert worker_of(self._server) == self._worker
        assert np.abs(self._known_pixels() - self._before).max() <= 1, batch

    def _answer(self, attempt: Attempt) -> httpx.Response:
        """The answer; a server that is full for a moment is asked again."""
        way = f"/predictions/{uuid.uuid4()}" if attempt.by_put else "/predictions"
        method = "PUT" if attempt.by_put else "POST"
        headers = {"content-type": "application/json"}
        self.counts["sent"] += 1
        while True:
            answer = self._client.request(method, way, content=attempt.body, headers=headers)
            if answer.status_code != 409:
                return answer
            self.counts["409"] += 1
            time.sleep(0.05)

    def _judge(self, attempt: Attempt, answer: httpx.Response) -> None:
        """Fail unless an answer has a form that it may have, and the one that it must have."""
        outcome, named = outcome_of(answer)
        self.counts[outcome] += 1
        assert named <= {*self.document.properties, "__root__"}
        if outcome == "succeeded":
            self.counts["images"] += check_images(answer.json(), attempt.inputs)
        if attempt.inputs is None:
            return
        inputs = json.loads(json.dumps(attempt.inputs))
        if not is_readable(inputs):
            assert outcome == "unreadable"
        elif forbidden := self.document.forbidden(inputs):
            assert (outcome, named) == ("invalid", forbidden)
        elif broken := broken_rules(inputs):
            assert outcome == "failed"
            assert named <= broken
        else:
            assert outcome == "succeeded"

    def _known_pixels(self) -> Any:
        (image,) = images_of(self._server.predict(KNOWN))
        return np.asarray(Image.open(io.BytesIO(image))).astype(int)


def outcome_of(answer: httpx.Response) -> tuple[str, set[str]]:
    """What became of a request, and the fields that a refusal names.

    Raises:
        AssertionError: it is no answer of a known form.
    """
    if answer.status_code == 400:
        assert answer.text.startswith("Failed to parse the request body as JSON: ")
        return "unreadable", set()
    if answer.status_code == 422 and answer.text.startswith("Failed to deserialize the JSON body"):
        return "no request", set()
    body = answer.json()
    if answer.status_code == 422:
        assert all(each["msg"] for each in body["detail"])
        return "invalid", {each["loc"][-1] for each in body["detail"]}
    assert answer.status_code == 200
    if body["status"] == "succeeded":
        return "succeeded", set()
    assert body["status"] == "failed"
    said = re.search(
        r"InvalidRequestError: ([a-z_, ]+): .* is not allowed: .*\. .*\.", body["error"]
    )
    assert said, "the error does not say what is wrong"
    return "failed", set(said[1].split(", "))


def check_images(answer: dict[str, Any], inputs: dict[str, Any] | None) -> int:
    """How many images an answer holds, all of which must be as asked for."""
    metrics, asked = answer["metrics"], inputs or {}
    images = images_of(answer)
    assert len(images) == metrics["images"] == len(metrics["seeds"])
    if inputs is not None:
        assert len(images) == asked.get("num_outputs", 1)
    for data in images:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.size == (metrics["width"], metrics["height"])
            assert image.width == asked.get("width", image.width)
            assert image.height == asked.get("height", image.height)
            if inputs is not None:
                assert image.format == FORMATS[asked.get("output_format", "png")]
    if "seed" in asked:
        assert metrics["seeds"][0] == asked["seed"]
    return len(images)


def is_readable(value: Any) -> bool:
    """Whether Cog's server can read a JSON value: all text is UTF-8, all numbers are doubles."""
    if isinstance(value, dict):
        return all(is_readable(each) for item in value.items() for each in item)
    if isinstance(value, list):
        return all(map(is_readable, value))
    if isinstance(value, str):
        return not any("\ud800" <= c <= "\udfff" for c in value)
    return not isinstance(value, int | float) or abs(value) <= sys.float_info.max  # no NaN either


def broken_rules(inputs: dict[str, Any]) -> set[str]:
    """The fields that break a rule which the document cannot express."""
    get = inputs.get
    prompt, negative, width, height = (
        get("prompt", ""), get("negative_prompt", ""), get("width"), get("height"),
    )  # fmt: skip
    broken = {
        "prompt": not has_visible_character(prompt) or "\0" in prompt,
        "negative_prompt": "\0" in negative or (negative and get("guidance_scale", 0) <= 1),
        "width": width is not None and (height is None or width % 8),
        "height": height is not None and (width is None or height % 8),
        "num_inference_steps": get("num_inference_steps", 4) not in (2, 4),
        "seed": get("seed", 0) + get("num_outputs", 1) - 1 > MAX_SEED,
        "fast_decode": get("fast_decode", False),
        # No text here is a LoRA's name; and what comes with one may be wrong too.
        "lora_weights": get("lora_weights"),
        "extra_lora": get("extra_lora"),
        "lora_scale": "lora_scale" in inputs and not get("lora_weights"),
        "extra_lora_scale": "extra_lora_scale" in inputs and not get("extra_lora"),
        **{name: get("lora_weights") for name in ("hf_api_token", "civitai_api_token")},
    }
    if width is not None and height is not None and width * height > MAX_PIXELS:
        broken |= {"width": True, "height": True}
    return {field for field, is_broken in broken.items() if is_broken}
