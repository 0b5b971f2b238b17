"""Many engines under load: more than they can do, what nobody wants any more, more and fewer."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway.fronts import front, run
from many import RECOVERY_S, Many, assert_none_lost, load, running, wait_for
from promises import Promises, promising
from soak.server_under_load import (
    SEED,
    TIMEOUT_S,
    Answer,
    KnownRequest,
    ask,
    fault_of,
    http_client,
    kind_of,
)

pytestmark = pytest.mark.scale
# Of an engine, and of the gateway's queue.
CAPACITY, MAX_QUEUED = 64, 128
ROOM = 2 * CAPACITY + MAX_QUEUED
LARGE = {"prompt": "never seen", "width": 512, "height": 512, "num_outputs": 4}
SLOW = {"prompt": "in turn", "width": 192, "height": 192, "num_inference_steps": 4}
# Beside those that engines have, and the clients' own: they wait in the gateway's line.
NUM_PROMISED = 64
# Within this whatever was asked has come to the gateway.
ARRIVED_S = 0.5
IDLE_S = 2.0


@pytest.fixture(scope="module")
def many(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    """Two engines, and a short queue."""
    folder = tmp_path_factory.mktemp("many")
    with running(model_folder, folder, "2", DMD2_MAX_QUEUED=str(MAX_QUEUED)) as many:
        many.wait_until_ready(2)
        yield many


def test_what_nobody_wants_is_given_up(
    many: Many, known: list[KnownRequest], request: pytest.FixtureRequest
) -> None:
    """So much is under way beside it that the gateway's own line is never empty."""
    is_full = request.config.getoption("--full")
    num_unwanted, num_others, max_delay_s = (200, 200, 5.0) if is_full else (40, 136, 1.0)
    with load(many, known, "wanted", num_others) as clients, ThreadPoolExecutor(8) as cancellers:
        asked = {
            id: cancellers.submit(cancel_by_id if n % 2 else leave, many, id, max_delay_s)
            for n, id in enumerate(f"unwanted-{n}" for n in range(num_unwanted))
        }
        kinds = {id: each.result() for id, each in asked.items()}
    ends = Counter(kinds.values())
    assert_none_lost(clients, num_others)
    assert ends["canceled"] > num_unwanted / 8
    assert ends["left"] > num_unwanted / 8
    wait_for(lambda: not began_and_not_left(many), 10, "the end of what was given up")
    began, left = (
        {id for id in many.ids(what) if id.startswith("unwanted")}
        for what in ("began", "cancelled")
    )
    in_line = {id for id, kind in kinds.items() if kind == "canceled"} - began
    print(f"seed {SEED}: {dict(ends)}; {len(began)} began, {len(in_line)} cancelled before that")
    assert began, "none was with an engine when it was given up"
    assert in_line, "none was in the gateway's line when it was cancelled"
    too_late = ends["succeeded"]
    assert len(began - left) <= too_late, "engines went on with what nobody wanted"
    for name in ("queue", "in_progress"):
        wait_for(lambda name=name: many.metric(name) == 0, 10, f"an empty {name}")
    with http_client(many.url) as http:
        assert fault_of(known[0], ask(http, "after", known[0].inputs)) is None


def cancel_by_id(many: Many, id: str, max_delay_s: float) -> str:
    """What became of it."""
    delay_s = random.Random(f"{SEED} {id}").uniform(0, max_delay_s)
    with ThreadPoolExecutor(1) as asking, http_client(many.url) as http:
        answer = asking.submit(ask, http, id, LARGE)
        time.sleep(delay_s)
        with http_client(many.url) as other:
            while not answer.done():
                if other.post(f"/predictions/{id}/cancel").status_code == 200:
                    break
                time.sleep(0.02)  # it has not come yet
        return answer.result().kind


def leave(many: Many, id: str, max_delay_s: float) -> str:
    """Close the connection."""
    delay_s = random.Random(f"{SEED} {id}").uniform(0.05, max_delay_s)
    with http_client(many.url, delay_s) as http:
        answer = ask(http, id, LARGE)
    return "left" if answer.kind == "silent" else answer.kind


def began_and_not_left(many: Many) -> set[str]:
    return many.ids("began") - many.ids("left")


def test_too_much_is_refused_and_the_rest_is_served_in_turn(many: Many) -> None:
    """Three times as much as there is room for."""
    with httpx.Client(base_url=many.url, timeout=TIMEOUT_S, trust_env=False) as http:
        codes = [http.post("/predictions", **slow(n)).status_code for n in range(ROOM)]
        assert codes == [202] * ROOM, "refused, though there was room"
        with ThreadPoolExecutor(32) as asking:
            more = {
                n: asking.submit(http.post, "/predictions", **slow(n))
                for n in range(ROOM, 3 * ROOM)
            }
    answers = {n: each.result() for n, each in more.items()}
    refused = [each for each in answers.values() if each.status_code != 202]
    assert refused, "as much as anybody likes was accepted"
    assert {each.status_code for each in refused} == {409}
    assert all(int(each.headers["Retry-After"]) >= 1 for each in refused)
    accepted = {*range(ROOM), *(n for n, each in answers.items() if each.status_code == 202)}
    wait_for(lambda: many.metric("in_progress") == 0, RECOVERY_S, "the end of all")
    assert sorted(turns(many)) == sorted(accepted), "not once what was accepted, and that alone"
    displaced = [abs(turn - number) for turn, number in enumerate(turns(many)) if number < ROOM]
    print(f"{len(refused)} of {len(more)} refused; out of turn by {max(displaced)} at most")
    assert max(displaced) <= CAPACITY / 2
    seeds = {
        body["id"]: body["metrics"]["seeds"]
        for body in many.listed()
        if body["id"].startswith("turn-") and body["status"] == "succeeded"
    }
    assert seeds == {f"turn-{number}": [number] for number in accepted}


def slow(number: int) -> dict[str, Any]:
    """A request that is answered later, as arguments of httpx."""
    body = {"id": f"turn-{number}", "input": {**SLOW, "seed": number}}
    return {"json": body, "headers": {"Prefer": "respond-async"}}


def turns(many: Many) -> list[int]:
    """The numbers of slow requests in the order in which engines were given them."""
    began = sorted(many.notes("began"), key=lambda note: note["time"])
    return [int(n["id"].removeprefix("turn-")) for n in began if n["id"].startswith("turn-")]


def test_all_that_was_accepted_is_answered_before_the_end(
    many: Many, known: list[KnownRequest]
) -> None:
    """What waits in the gateway's line, too. The last test of this gateway."""
    with load(many, known, "last", 2 * CAPACITY + 16) as clients:
        with promising(many.url, known, "promised") as promised:
            wait_for(lambda: len(promised) >= NUM_PROMISED, RECOVERY_S, "what is promised")
        asked = set(clients.asking)
        time.sleep(ARRIVED_S)
        began = many.ids("began")
        num_queued = many.metric("queue")
        many.process.send_signal(signal.SIGTERM)
        assert many.process.wait(RECOVERY_S) == 0
    waited = set(promised) - began
    print(f"{num_queued:g} in line, {len(waited)} of them promised; then {dict(clients.kinds)}")
    assert num_queued > 0
    assert waited, "engines had all that was promised"
    answers = {answer.prediction_id: (answer, fault) for answer, fault in clients.answers}
    lost = [answers[id] for id in asked if answers[id][1] is not None]
    assert not lost, f"asked before the end, and not answered: {lost[:3]}"
    assert not [f for a, f in answers.values() if a.kind == "succeeded" and f]
    assert many.ids("began") == many.ids("left"), "it ended with some under way"
    assert not [id for id in many.ids("cancelled") if id.startswith("last-")]
    assert set(clients.kinds) <= {"succeeded", "unready", "closed"}, clients.kinds
    assert clients.kinds["unready"] > 0, "nobody was told that it ends"
    for id, answer in kept(many.folder, promised).items():
        assert fault_of(promised[id], answer) is None


def kept(folder: Path, promised: Promises) -> dict[str, Answer]:
    """What another gateway tells of predictions; its engines are none that make pictures."""
    answers = {}

    async def read() -> None:
        async with front(folder) as gateway:
            for id in promised:
                response = await gateway.http.get(f"/v1/predictions/{id}")
                answers[id] = Answer(id, kind_of(response), 0.0, response.json())

    run(read)
    return answers


def test_engines_come_and_go_with_the_load(
    model_folder: Path, known: list[KnownRequest], tmp_path: Path
) -> None:
    with running(model_folder, tmp_path, "1-3") as many:
        many.wait_until_ready(1)
        with load(many, known, "up") as clients:
            seconds = wait_for(lambda: len(many.engines()) == 3, RECOVERY_S, "three engines")
            time.sleep(2 * IDLE_S)
        idle_s = [first_work_s(many, pid) for pid in many.engines()[1:]]
        print(f"three engines after {seconds:.1f} s, idle for {idle_s} s")
        assert_none_lost(clients, 64)
        with load(many, known, "down", 4) as few:
            wait_for(lambda: len(many.engines()) == 1, RECOVERY_S, "one engine")
        assert_none_lost(few, 4)
        assert max(idle_s) < IDLE_S


def first_work_s(many: Many, pid: int) -> float:
    """How long an engine that was ready had nothing to do at first."""
    ready, *_ = (note["time"] for note in many.notes("ready") if note["pid"] == pid)
    began, *_ = (note["time"] for note in many.notes("began") if note["pid"] == pid)
    return float(began - ready)
