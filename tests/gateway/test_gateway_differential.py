"""The gateway against Cog's own server: the same requests, and the same answers but for a list.

Status, failing fields, messages, error, logs, metrics that do not measure, and pixels (1/255). The
hostile corpus and the fuzz are tests/server's; `--full` sends all of both, and draws another seed.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import re
import secrets
import socket
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest
from cog_server import CogServer
from fuzz_requests import Attempt, Document
from hostile_inputs import (
    BODIES,
    HEADERS,
    IDS,
    INVISIBLE,
    JSON,
    MALFORMED,
    NOT_JSON,
    OK,
    PROMPTS,
    VALUES,
)
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from servers import assert_alike, images_of

TIMEOUT_S = 120.0
NUM_VALUES = 60
BATCH, NUM_BATCHES, NUM_BATCHES_FULL = 16, 2, 320
_DOUBLE = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")
PREFIX = "Prediction failed: Async prediction failed: "
# What is measured, or is of one server alone.
MEASURED = {"predict_time", "seconds", "batch_sizes", "ways", "attempts"}
# Deviations, as deploy/gateway/cog_dialect.py lists them: the gateway's status.
BODIES_APART = {"webhook nonsense": 422}
# What is no HTTP uvicorn judges in place of hyper: it takes some of it, and has other limits.
HEADERS_APART = {"control character": 200}
MALFORMED_APART = {"2000 headers": 422, "long address": 404, "HTTP/3": 200}


class Pair:
    """Cog's server and the gateway."""

    def __init__(self, cog_url: str, gateway_url: str) -> None:
        self.cog, self.gateway = (
            httpx.Client(base_url=url, trust_env=False, timeout=TIMEOUT_S)
            for url in (cog_url, gateway_url)
        )
        self.document = Document(self.cog.get("/openapi.json").json())

    def ask(self, method: str, path: str, **request: Any) -> list[httpx.Response]:
        """Both answers; a server that is full for a moment is asked again."""
        clients = (self.cog, self.gateway)
        return [self._ask(client, method, path, **request) for client in clients]

    def _ask(self, client: httpx.Client, method: str, path: str, **request: Any) -> httpx.Response:
        while True:
            answer = client.request(method, path, **request)
            if answer.status_code != 409:
                return answer
            time.sleep(0.05)

    def agree(self, method: str, path: str, **request: Any) -> str:
        """Fail unless both answers say the same; what they said, in a word."""
        cog, gateway = self.ask(method, path, **request)
        told = f"{method} {path} {str(request)[:2000]}\n{cog.text[:1000]}\n{gateway.text[:1000]}"
        assert said_of(gateway) == said_of(cog), told
        if cog.status_code == 200 and cog.json().get("status") == "succeeded":
            if cog.json()["metrics"]["seeds"] == gateway.json()["metrics"]["seeds"]:
                assert_alike(images_of(gateway.json()), images_of(cog.json()))
            return "succeeded"
        return str(cog.json()["status"] if cog.status_code == 200 else cog.status_code)


@pytest.fixture(scope="module")
def pair(server: CogServer, gateway_url: str) -> Pair:
    deadline = time.monotonic() + 60
    while httpx.get(f"{gateway_url}/ready", trust_env=False).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return Pair(server.url, gateway_url)


def said_of(answer: httpx.Response) -> dict[str, Any]:
    """What an answer says, without what differs from run to run, and what the list has."""
    said: dict[str, Any] = {"status_code": answer.status_code}
    said["kind"] = answer.headers.get("content-type")
    if said["kind"] != "application/json":
        return said | {"text": answer.text.partition(":")[0]}
    # Cog's server misreads the last digit of some doubles, which its messages show.
    body = json.loads(_DOUBLE.sub(lambda found: f"{float(found[0]):.12g}", answer.text))
    if answer.status_code != 200 or "status" not in body:
        return said | {"body": body}
    metrics = {name: value for name, value in body["metrics"].items() if name not in MEASURED}
    drawn = "seed" not in (answer.request.content or b"").decode(errors="replace")
    if drawn:  # each server draws its own
        metrics.pop("seeds", None)
    if body["status"] == "failed":  # what it printed just before comes too late to Cog's server
        body["logs"] = ""
    return said | {
        "fields": sorted(body),
        "status": body["status"],
        "error": body.get("error", "").removeprefix(PREFIX),
        "logs": re.sub(r"seed \d+", "seed", body["logs"]) if drawn else body["logs"],
        "metrics": metrics,
        "measured": sorted(MEASURED & body["metrics"].keys() - {"attempts"}),
        "outputs": [files_form(output) for output in body.get("output", ())],
    }


def files_form(output: str) -> str:
    """A file's media type, which its content must have."""
    head = output.partition(",")[0]
    (data,) = images_of({"status": "succeeded", "output": [output]})
    with Image.open(io.BytesIO(data)) as image:
        assert head == f"data:{image.get_format_mimetype()};base64"
        return f"{head} {image.size}"


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name: str, pair: Pair) -> None:
    body = BODIES[name][0]
    if name not in BODIES_APART:
        pair.agree("POST", "/predictions", content=body, headers=JSON)
        return
    _, gateway = pair.ask("POST", "/predictions", content=body, headers=JSON)
    assert gateway.status_code == BODIES_APART[name]


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, pair: Pair) -> None:
    headers = HEADERS[name][0]
    cog, gateway = pair.ask("POST", "/predictions", content=OK, headers=headers)
    assert gateway.status_code == HEADERS_APART.get(name, cog.status_code)


def test_values(pair: Pair, request: pytest.FixtureRequest) -> None:
    """A field and a value that it may not have, or may: some pairs of all."""
    pairs = list(itertools.product(pair.document.properties, (*NOT_JSON, *VALUES)))
    if not request.config.getoption("--full"):
        pairs = random.Random(20).sample(pairs, NUM_VALUES)
    kinds: Counter[str] = Counter()
    for field, value in pairs:
        given = b"" if field == "seed" else b'"seed":1,'
        given += b"" if field == "prompt" else b'"prompt":"x",'
        body = b'{"input":{%b"%b":%b}}' % (given, field.encode(), value.encode())
        kinds[pair.agree("POST", "/predictions", content=body, headers=JSON)] += 1
    assert set(kinds) == {"400", "422", "failed", "succeeded"}, kinds


def test_prompts(pair: Pair, request: pytest.FixtureRequest) -> None:
    prompts = [*(prompt for prompt, _ in PROMPTS.values()), *INVISIBLE]
    if not request.config.getoption("--full"):
        prompts = prompts[::6]
    for prompt in prompts:
        inputs = {"prompt": prompt, "seed": 1, "num_inference_steps": 2}
        pair.agree("POST", "/predictions", json={"input": inputs})


@pytest.mark.parametrize("name", IDS)
def test_ids_that_the_gateway_refuses(name: str, pair: Pair) -> None:
    """Cog's server makes folders of them."""
    body = OK[:-1] + b',"id":%b}' % json.dumps(IDS[name][0].format(token="t")).encode()
    answer = pair.gateway.post("/predictions", content=body, headers=JSON)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "id"]


def test_what_is_beside_predictions(pair: Pair) -> None:
    cog, gateway = pair.ask("GET", "/openapi.json")
    assert gateway.json() == cog.json()
    for method, path in (
        ("GET", "/nothing"),
        ("GET", "/predictions"),
        ("GET", "/predictions/x"),
        ("GET", "/predictions/"),
        ("DELETE", "/predictions/x"),
        ("POST", "/predictions/x/cancel"),
        ("GET", "/predictions/x/cancel"),
        ("POST", "/health-check"),
        ("PUT", "/predictions/"),
    ):
        cog, gateway = pair.ask(method, path)
        assert (gateway.status_code, gateway.text) == (cog.status_code, cog.text)
        allowed = [
            set(re.findall(r"\w+", each.headers.get("allow", ""))) for each in (cog, gateway)
        ]
        assert allowed[0] == allowed[1]
    cog, gateway = pair.ask("GET", "/")
    assert set(cog.json().items()) - set(gateway.json().items()) == {("shutdown_url", "/shutdown")}
    cog, gateway = pair.ask("GET", "/health-check")
    assert set(gateway.json()) == set(cog.json())
    assert set(gateway.json()["setup"]) == set(cog.json()["setup"])
    assert gateway.json()["status"] == cog.json()["status"] == "READY"


def test_malformed_http_does_no_harm(pair: Pair) -> None:
    url = pair.gateway.base_url
    for name, (data, status) in MALFORMED.items():
        answer = b""
        with (
            socket.create_connection((url.host, url.port), timeout=20) as connection,
            suppress(ConnectionError),
        ):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(1000)
        expected = MALFORMED_APART.get(name, status) or 0
        assert answer[:13] in (b"", b"HTTP/1.1 %d " % expected), name
    pair.agree("POST", "/predictions", content=OK, headers=JSON)


def test_random_requests(pair: Pair, request: pytest.FixtureRequest) -> None:
    is_full = request.config.getoption("--full")
    chosen = secrets.randbelow(2**32) if is_full else 20
    print(f"seed {chosen}")
    kinds: Counter[str] = Counter()

    @seed(chosen)
    @settings(
        max_examples=NUM_BATCHES_FULL if is_full else NUM_BATCHES,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
        deadline=None,
    )
    @given(st.lists(pair.document.attempts(), min_size=BATCH, max_size=BATCH))
    def send(batch: list[Attempt]) -> None:
        with ThreadPoolExecutor(BATCH) as pool:
            kinds.update(pool.map(lambda attempt: sent(pair, attempt), batch))

    try:
        send()
    finally:
        print(dict(sorted(kinds.items())))
    assert set(kinds) >= {"400", "422", "failed", "succeeded"}


def sent(pair: Pair, attempt: Attempt) -> str:
    """What both say of an attempt, with a seed of its own where it has none."""
    if attempt.inputs is not None and "seed" not in attempt.inputs:
        inputs = {**attempt.inputs, "seed": 5}
        attempt = replace(attempt, inputs=inputs, body=json.dumps({"input": inputs}).encode())
    way = f"/predictions/{uuid.uuid4()}" if attempt.by_put else "/predictions"
    if attempt.body.lstrip()[:1] == b"[":  # is not read the way Cog's server reads it
        answers = pair.ask("POST", way, content=attempt.body, headers=JSON)
        assert {answer.status_code for answer in answers} <= {400, 422}
        return "list"
    method = "PUT" if attempt.by_put else "POST"
    return pair.agree(method, way, content=attempt.body, headers=JSON)
