"""Three times the load that the server can bear: all are answered in time, and then it is free."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_under_load import TIMEOUT_S, Answer, ask, http_client, kind_of
from servers import start, worker_of
from usage import Usage, assert_counts_flat, assert_memory_flat

from dmd2.engine.engine import Engine
from dmd2.request.generation_request import GenerationRequest

OVERLOAD_S, SHORT_S = 60.0, 8.0
TIMES_TOO_MUCH = 3
QUEUE_TIMEOUT_S, RUN_TIMEOUT_S = 2, 10
# Between the engine and the client, on a busy machine.
SLACK_S = 1.0
MAX_FLOODS = 3
MAX_GROWTH = 0.05
# Slots for so many seconds of work: some wait for too long, and still there are too few.
SLOTS_S = 2 * QUEUE_TIMEOUT_S
INPUTS: dict[str, Any] = {"prompt": "a red circle", "width": 384, "height": 384, "seed": 1}


def test_overload(
    request: pytest.FixtureRequest, model_folder: Path, engine: Engine, tmp_path: Path
) -> None:
    full = request.config.getoption("--full")
    seconds = OVERLOAD_S if full else SHORT_S
    limits = {
        "DMD2_QUEUE_TIMEOUT_S": str(QUEUE_TIMEOUT_S),
        "DMD2_RUN_TIMEOUT_S": str(RUN_TIMEOUT_S),
        "DMD2_OUTPUT_DIR": str(tmp_path),
        "COG_MAX_CONCURRENCY": str(round(SLOTS_S * engines_throughput(engine))),
    }
    with start(model_folder, **limits) as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        pid = worker_of(server)
        per_second = throughput(server.url)
        for _ in range(MAX_FLOODS):
            rate = TIMES_TOO_MUCH * per_second
            answers, usages = asyncio.run(watched(flood(server.url, rate, seconds), pid))
            alone = answer_alone(server.url)
            reasons = Counter(reason_of(answer) for answer in answers)
            if reasons["succeeded"] < len(answers) * 2 / 3:
                break
            # The machine was busy with something else when it was asked how much it can bear.
            per_second = max(per_second, reasons["succeeded"] / seconds)
    print(f"overload, {per_second:.1f}/s borne, {rate:.1f}/s asked: {dict(reasons)}")
    first, last = usages[len(usages) // 3], usages[-1]
    print(f"worker after a third {first}, last {last}; then alone in {alone.seconds:.2f} s")
    assert set(reasons) <= {"succeeded", "full", "deadline"}, reasons
    assert reasons["succeeded"] < len(answers) * 2 / 3, "that was no overload"
    assert reasons["succeeded"] > seconds * per_second / 3, "it served little of what it could"
    assert [a for a in answers if is_late(a)] == []
    assert_counts_flat(usages)
    if full:  # too short a run says nothing of the memory
        assert_memory_flat(usages, MAX_GROWTH)
    assert alone.kind == "succeeded"
    assert alone.seconds < 3 / per_second + SLACK_S, "the queue was not empty"


def engines_throughput(engine: Engine) -> float:
    """Requests a second of an engine without a server."""
    request = GenerationRequest.resolve(engine.card, **INPUTS)
    engine.submit(request).result()
    results = [engine.submit(request).result() for _ in range(4)]
    return len(results) / sum(sum(result.seconds.values()) for result in results)


def throughput(url: str) -> float:
    """Requests a second that the server answers when one follows the other."""
    with http_client(url) as http:
        ask(http, "warm-up", INPUTS)
        answers = [ask(http, f"alone-{number}", INPUTS) for number in range(6)]
    answered = [answer.seconds for answer in answers if answer.kind == "succeeded"]
    return len(answered) / sum(answered)


async def watched(
    flooding: Coroutine[Any, Any, list[Answer]], pid: int
) -> tuple[list[Answer], list[Usage]]:
    """What a flood comes to, and what a process used meanwhile, every second."""
    task, usages = asyncio.create_task(flooding), []
    while not task.done():
        usages.append(Usage.of(pid))
        await asyncio.wait([task], timeout=1)
    return task.result(), usages


async def flood(url: str, rate: float, seconds: float) -> list[Answer]:
    """The answers to requests that come at a rate, however long the others take."""
    limits = httpx.Limits(max_connections=None)
    began = time.monotonic()
    async with httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, trust_env=False, limits=limits
    ) as http:
        tasks = []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(began + number / rate - time.monotonic())
            tasks.append(asyncio.create_task(ask_once(http, f"flood-{time.time_ns():x}-{number}")))
        return await asyncio.gather(*tasks)


async def ask_once(http: httpx.AsyncClient, prediction_id: str) -> Answer:
    began = time.monotonic()
    response = await http.post("/predictions", json={"id": prediction_id, "input": INPUTS})
    body: dict[str, Any] = response.json()
    body.pop("output", None)
    return Answer(prediction_id, kind_of(response), time.monotonic() - began, body)


def answer_alone(url: str) -> Answer:
    """The answer to a request right after the flood, when all the others have theirs."""
    time.sleep(0.1)  # Cog's server frees a slot just after its response
    with http_client(url) as http:
        return ask(http, "after", INPUTS)


def reason_of(answer: Answer) -> str:
    """The kind of an answer; an error by its cause."""
    if answer.kind == "failed" and "DMD2_QUEUE_TIMEOUT_S" in answer.body["error"]:
        return "deadline"
    return answer.kind if answer.kind != "failed" else str(answer.body["error"])


def is_late(answer: Answer) -> bool:
    """Whether an answer took longer than its kind may."""
    if answer.kind == "full":
        return answer.seconds > SLACK_S
    if answer.kind != "succeeded":
        return answer.seconds > QUEUE_TIMEOUT_S + SLACK_S
    spent = answer.body["metrics"]["seconds"]
    running = sum(spent.values()) - spent["queue"]
    return bool(answer.seconds > QUEUE_TIMEOUT_S + min(running, RUN_TIMEOUT_S) + SLACK_S)
