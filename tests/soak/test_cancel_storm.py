"""Requests that are given up at random moments leave nothing behind: no slot, no change."""

from __future__ import annotations

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_under_load import (
    BACK_OFF_S,
    SEED,
    TIMEOUT_S,
    Answer,
    Clients,
    KnownRequest,
    ask,
    fault_of,
    files_of,
    http_client,
    kind_of,
    known_requests,
)
from servers import start

from dmd2.sampling.pipeline import Pipeline

NUM_UNWANTED, NUM_SHORT = 1_000, 60
NUM_CANCELLERS, NUM_CLIENTS, NUM_SLOTS = 4, 2, 8
# The moments reach from before the first step until after the last.
MAX_DELAY_S = 0.6
LATER = {"Prefer": "respond-async"}
LARGE = {"prompt": "never seen", "width": 768, "height": 768, "num_outputs": 4}


def test_cancel_storm(
    request: pytest.FixtureRequest, model_folder: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    num_unwanted = NUM_UNWANTED if request.config.getoption("--full") else NUM_SHORT
    known = known_requests(pipeline, tmp_path / "alone", 12)
    slots = {"COG_MAX_CONCURRENCY": str(NUM_SLOTS), "DMD2_OUTPUT_DIR": str(tmp_path / "outputs")}
    with start(model_folder, **slots) as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        before = files_alone(server.url, known)
        clients = Clients(server.url, known, NUM_CLIENTS, "wanted")
        with ThreadPoolExecutor(NUM_CANCELLERS) as cancellers:
            cancelled = [cancellers.submit(cancel, server.url, n) for n in range(num_unwanted)]
            ends = Counter(future.result() for future in cancelled)
        clients.stop()
        print(f"cancel storm, seed {SEED}: {dict(ends)}; wanted: {dict(clients.kinds)}")
        assert not clients.faults, clients.faults
        assert clients.kinds["succeeded"] > num_unwanted / 20
        assert sum(n for end, n in ends.items() if "too late" not in end) > num_unwanted / 5
        assert_every_slot_is_free(server.url)
        assert files_alone(server.url, known) == before


def files_alone(url: str, known: list[KnownRequest]) -> list[list[bytes]]:
    """What the server makes of the known requests, one after another, with nothing beside."""
    with http_client(url) as http:
        answers = [ask_when_free(http, f"alone-{n}", each) for n, each in enumerate(known)]
    return [files_of(answer) for answer in answers]


def ask_when_free(http: httpx.Client, prediction_id: str, known: KnownRequest) -> Answer:
    answer = ask(http, prediction_id, known.inputs)
    while answer.kind == "full":  # for a moment after the request before
        time.sleep(BACK_OFF_S)
        answer = ask(http, prediction_id, known.inputs)
    assert (fault := fault_of(known, answer)) is None, fault
    return answer


def cancel(url: str, number: int) -> str:
    """Make a request and give it up in one of three ways; the way, and whether it was in time."""
    rng = random.Random(f"{SEED} cancel {number}")
    inputs = {
        "prompt": f"unwanted {number}",
        "seed": number,
        "num_outputs": rng.choice((1, 1, 4)),
        "width": rng.choice((64, 64, 128)),
        "height": 64,
        "guidance_scale": rng.choice((0, 3)),
    }
    way = rng.choice((leave, cancel_put, cancel_posted))
    in_time = way(url, f"unwanted-{number}", inputs, rng.uniform(0, MAX_DELAY_S))
    return way.__name__ if in_time else f"{way.__name__}, too late"


def leave(url: str, prediction_id: str, inputs: dict[str, Any], delay_s: float) -> bool:
    """Close the connection before the answer."""
    body = {"id": prediction_id, "input": inputs}
    with http_client(url, delay_s) as http:
        try:
            assert kind_of(http.post("/predictions", json=body)) in ("succeeded", "full")
        except httpx.TimeoutException:
            return True
    return False


def cancel_put(url: str, prediction_id: str, inputs: dict[str, Any], delay_s: float) -> bool:
    """Have another client cancel it while this one waits."""
    path = f"/predictions/{prediction_id}"
    with http_client(url) as http, ThreadPoolExecutor(1) as waiting:
        answer = waiting.submit(http.put, path, json={"input": inputs})
        time.sleep(delay_s)
        cancelled = bool(httpx.post(f"{url}{path}/cancel", timeout=TIMEOUT_S).is_success)
        kind = kind_of(answer.result())
    assert kind in ("canceled", "succeeded", "full"), answer.result().text
    return cancelled and kind == "canceled"


def cancel_posted(url: str, prediction_id: str, inputs: dict[str, Any], delay_s: float) -> bool:
    """Cancel what nobody waits for."""
    with http_client(url) as http:
        body = {"id": prediction_id, "input": inputs}
        if http.post("/predictions", json=body, headers=LATER).status_code == 409:
            return False
        time.sleep(delay_s)
        return bool(http.post(f"/predictions/{prediction_id}/cancel").is_success)


def assert_every_slot_is_free(url: str) -> None:
    """As many requests as there are slots are accepted, and one more is not."""
    with http_client(url) as http:
        assert health_in_time(http, "READY") == "READY"
        ids = [f"slot-{number}" for number in range(NUM_SLOTS + 1)]
        codes = [
            http.put(f"/predictions/{each}", json={"input": LARGE}, headers=LATER).status_code
            for each in ids
        ]
        assert codes == [202] * NUM_SLOTS + [409], f"seed {SEED}: a slot was lost, or made"
        assert health_in_time(http, "BUSY") == "BUSY"
        for each in ids[:-1]:
            assert http.post(f"/predictions/{each}/cancel").is_success
        assert health_in_time(http, "READY") == "READY"


def health_in_time(http: httpx.Client, wanted: str) -> str:
    """The server's health, once it is as wanted, or after two seconds."""
    deadline = time.monotonic() + 2
    while (status := str(http.get("/health-check").json()["status"])) != wanted:
        if time.monotonic() > deadline:
            break
        time.sleep(BACK_OFF_S)
    return status
