"""Many engines under load: more than they can do, what nobody wants any more, more and fewer."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from many import RECOVERY_S, Many, assert_none_lost, load, running, wait_for
from soak.server_under_load import (
    SEED,
    TIMEOUT_S,
    KnownRequest,
    ask,
    fault_of,
    http_client,
    known_requests,
)

from dmd2.sampling.pipeline import Pipeline

pytestmark = pytest.mark.scale
# Of an engine, and of the gateway's queue.
CAPACITY, MAX_QUEUED = 64, 64
LARGE = {"prompt": "never seen", "width": 512, "height": 512, "num_outputs": 4}
SLOW = {"prompt": "in turn", "width": 256, "height": 256, "num_inference_steps": 4}
MAX_DELAY_S = 1.0
IDLE_S = 2.0


@pytest.fixture(scope="module")
def known(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> list[KnownRequest]:
    return known_requests(pipeline, tmp_path_factory.mktemp("alone"), 24)


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
    num_unwanted = 200 if request.config.getoption("--full") else 40
    with load(many, known, "wanted", 32) as clients, ThreadPoolExecutor(8) as cancellers:
        asked = [
            cancellers.submit(cancel_by_id if n % 2 else leave, many, f"unwanted-{n}")
            for n in range(num_unwanted)
        ]
        ends = Counter(each.result() for each in asked)
    print(f"seed {SEED}: {dict(ends)}")
    assert_none_lost(clients, 32)
    assert ends["canceled"] > num_unwanted / 8
    assert ends["left"] > num_unwanted / 8
    wait_for(lambda: not began_and_not_left(many), 10, "the end of what was given up")
    began, left = (
        {note["id"] for note in many.notes(what) if note["id"].startswith("unwanted")}
        for what in ("began", "cancelled")
    )
    assert began, "none was with an engine when it was given up"
    too_late = ends["succeeded"]
    assert len(began - left) <= too_late, "engines went on with what nobody wanted"
    with http_client(many.url) as http:
        assert fault_of(known[0], ask(http, "after", known[0].inputs)) is None


def cancel_by_id(many: Many, id: str) -> str:
    """What became of it."""
    delay_s = random.Random(f"{SEED} {id}").uniform(0, MAX_DELAY_S)
    with ThreadPoolExecutor(1) as asking, http_client(many.url) as http:
        answer = asking.submit(ask, http, id, LARGE)
        time.sleep(delay_s)
        with http_client(many.url) as other:
            while not answer.done():
                if other.post(f"/predictions/{id}/cancel").status_code == 200:
                    break
                time.sleep(0.02)  # it has not come yet
        return answer.result().kind


def leave(many: Many, id: str) -> str:
    """Close the connection."""
    delay_s = random.Random(f"{SEED} {id}").uniform(0.05, MAX_DELAY_S)
    with http_client(many.url, delay_s) as http:
        answer = ask(http, id, LARGE)
    return "left" if answer.kind == "silent" else answer.kind


def began_and_not_left(many: Many) -> set[str]:
    began, left = ({note["id"] for note in many.notes(what)} for what in ("began", "left"))
    return began - left


def test_too_much_is_refused_and_the_rest_is_served_in_turn(many: Many) -> None:
    room = 2 * CAPACITY + MAX_QUEUED
    with httpx.Client(base_url=many.url, timeout=TIMEOUT_S, trust_env=False) as http:
        codes = [http.post("/predictions", **slow(n)).status_code for n in range(room)]
        assert codes == [202] * room, "refused, though there was room"
        with ThreadPoolExecutor(32) as asking:
            more = [asking.submit(http.post, "/predictions", **slow(room + n)) for n in range(256)]
        refused = [each.result() for each in more if each.result().status_code != 202]
    assert refused, "as much as anybody likes was accepted"
    assert {each.status_code for each in refused} == {409}
    assert all(int(each.headers["Retry-After"]) >= 1 for each in refused)
    wait_for(lambda: len(turns(many)) >= room, RECOVERY_S, "the last one's turn")
    displaced = [abs(turn - number) for turn, number in enumerate(turns(many)) if number < room]
    print(f"{len(refused)} of 256 refused; out of turn by {max(displaced)} at most")
    assert max(displaced) <= CAPACITY / 2
    wait_for(lambda: not began_and_not_left(many), RECOVERY_S, "the end of all")


def slow(number: int) -> dict[str, object]:
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
    """The last test of this gateway."""
    promised = [f"promised-{n}" for n in range(16)]
    with load(many, known, "last") as clients:
        for number, id in enumerate(promised):
            many.later(id, known[number])
        many.process.send_signal(signal.SIGTERM)
        assert many.process.wait(RECOVERY_S) == 0
    began, left = ({note["id"] for note in many.notes(what)} for what in ("began", "left"))
    assert began == left, f"ended with {began - left} under way"
    assert set(promised) <= left
    answered = {answer.prediction_id: (answer, fault) for answer, fault in clients.answers}
    lost = [id for id in began if id.startswith("last-") and answered[id][1] is not None]
    assert not lost, f"accepted and lost: {lost}"
    assert set(clients.kinds) <= {"succeeded", "unready", "closed"}, clients.kinds
    print(f"at the end: {dict(clients.kinds)}")
    assert clients.kinds["unready"] > 0, "nobody was told that it ends"


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
