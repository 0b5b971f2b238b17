"""Whatever is killed under load, no prediction that was accepted is lost, and none is wrong."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from many import (
    DEMO,
    END_S,
    RECOVERY_S,
    Many,
    assert_none_lost,
    load,
    num_retried,
    print_cost,
    rounds,
    running,
    wait_for,
    whole_tree,
)
from promises import Promises, by_cog, promising
from scripted_notes import DEADLY, STUCK
from soak.server_under_load import (
    SEED,
    KnownRequest,
    ask,
    fault_of,
    http_client,
)

pytestmark = pytest.mark.scale
NUM_CLIENTS = 64
GATEWAY_BACK_S = 10.0


@pytest.fixture(scope="module")
def many(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    """Two engines."""
    with running(model_folder, tmp_path_factory.mktemp("many"), "2") as many:
        many.wait_until_ready(2)
        yield many


@pytest.mark.parametrize("num_victims", [1, 2], ids=["one engine", "both engines"])
def test_nobody_notices_a_death(
    num_victims: int, many: Many, known: list[KnownRequest], request: pytest.FixtureRequest
) -> None:
    for number in rounds(request):
        kill_engines(many, known, f"{num_victims}-of-2-{number}", num_victims, 2)


def test_nobody_notices_a_death_among_three_engines_of_the_demo(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("with --full")
    known = request.getfixturevalue("known_of_the_demo")
    with running(DEMO, tmp_path, "3") as many:
        kill_engines(many, known, "demo", 2, 3)


def kill_engines(
    many: Many, known: list[KnownRequest], name: str, num_victims: int, num_engines: int
) -> None:
    """Kill so many of the engines under load, and see that nobody notices."""
    many.wait_until_ready(num_engines)
    with load(many, known, name, NUM_CLIENTS) as clients:
        time.sleep(1.0)
        for pid in many.engines()[:num_victims]:
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        many.wait_until_ready(num_engines, RECOVERY_S)
        seconds = time.monotonic() - killed
    print_cost(f"{num_victims} of {num_engines} engines", clients, seconds)
    assert_none_lost(clients, NUM_CLIENTS)
    assert num_retried(clients) > 0, "nothing was under way"


def test_the_controller_after_one_that_died_replaces_engines(
    many: Many, known: list[KnownRequest], request: pytest.FixtureRequest
) -> None:
    for number in rounds(request):
        many.wait_until_ready(2)
        with load(many, known, f"controller-{number}", NUM_CLIENTS) as clients:
            time.sleep(1.0)
            dead, engines = many.controller(), many.engines()
            os.kill(dead, signal.SIGKILL)
            there_s = wait_for(lambda dead=dead: next_controller(many, dead), RECOVERY_S, "another")
            os.kill(engines[0], signal.SIGKILL)
            wait_for(lambda engines=engines: engines[0] not in many.engines(), 10, "its end")
            seconds = wait_for(lambda: len(many.engines()) == 2, RECOVERY_S, "its engine")
            assert next_controller(many, dead), "the first one is back"
        print_cost(f"another controller after {there_s:.1f} s, and its engine", clients, seconds)
        assert_none_lost(clients, NUM_CLIENTS)
        assert num_retried(clients) > 0, "nothing was under way"


def next_controller(many: Many, dead: int) -> list[int]:
    return [pid for pid in many.pids("ServeController") if pid != dead]


def test_a_query_of_death_ends_alone(many: Many, known: list[KnownRequest]) -> None:
    before = len(many.notes("ready"))
    patient = http_client(many.url, 2 * RECOVERY_S)
    with load(many, known, "innocent", 31) as clients, patient as http:
        answer = ask(http, "deadly", {"prompt": DEADLY, "seed": 1})
    assert answer.kind == "failed", answer
    assert "may be what ends" in answer.body["error"]
    assert_none_lost(clients, 31)
    many.wait_until_ready(2, RECOVERY_S)
    assert len(many.notes("ready")) - before <= 3, "more engines than three were killed"


def test_an_engine_that_hangs_is_replaced(many: Many, known: list[KnownRequest]) -> None:
    """It answers nothing of what it holds, though that is late before it is known to hang."""
    many.wait_until_ready(2)
    patient = http_client(many.url, 2 * RECOVERY_S)
    with load(many, known, "beside", 16) as clients, patient as http:
        answer = ask(http, "stuck", {"prompt": STUCK, "seed": 1})
        pids = [note["pid"] for note in many.notes("began") if note["id"] == "stuck"]
    print(f"the request that hung was answered after {answer.seconds:.1f} s")
    assert answer.kind == "succeeded", answer
    assert answer.body["metrics"]["attempts"] == len(pids) == 2
    assert_none_lost(clients, 16)
    assert num_retried(clients) > 0, "nothing was under way"
    assert not psutil.pid_exists(pids[0])


def test_a_full_disk_ends_no_engine(
    many: Many, known: list[KnownRequest], request: pytest.FixtureRequest
) -> None:
    """What is asked for waits for room, which all engines here share, and costs no try."""
    if not request.config.getoption("--full"):
        pytest.skip("with --full; test_full_disk.py has stand-ins")
    many.wait_until_ready(2)
    num_loaded, outputs = len(many.notes("ready")), many.folder / "outputs"
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.write_text("no folder")
    try:
        for number in range(8):
            by_cog(many.http, f"roomless-{number}", known[number].inputs)
        wait_for(lambda: num_ready(many) == 0, RECOVERY_S, "the word that all disks are full")
        time.sleep(8.0)  # Serve kills an engine that is unhealthy after six
    finally:
        outputs.unlink()
    assert not [note for note in many.notes("began") if note["id"].startswith("roomless")]
    for number in range(8):
        wait_for(lambda id=f"roomless-{number}": many.ended(id) is not None, RECOVERY_S, "an end")
        answer = many.ended(f"roomless-{number}")
        assert answer is not None
        assert fault_of(known[number], answer) is None
        assert answer.body["metrics"]["attempts"] == 1
    wait_for(lambda: num_ready(many) == 2, RECOVERY_S, "the word that there is room")
    assert len(many.notes("ready")) == num_loaded


def num_ready(many: Many) -> int:
    told = many.http.get("/metrics").text
    (number,) = re.findall(r"^dmd2_gateway_engines_ready (\S+)", told, re.MULTILINE)
    return int(float(number))


@pytest.mark.parametrize("num_deaths", [1, 2])
def test_what_was_promised_outlives_the_gateway(
    num_deaths: int, many: Many, known: list[KnownRequest], request: pytest.FixtureRequest
) -> None:
    if num_deaths > 1 and not request.config.getoption("--full"):
        pytest.skip("with --full")
    for number in rounds(request):
        name = f"{num_deaths}-{number}"
        many.wait_until_ready(2)
        with (
            load(many, known, f"open-{name}", 16) as clients,
            promising(many.url, known, f"promised-{name}") as promised,
        ):
            wait_for_a_moment(name)
            back_s = []
            for _ in range(num_deaths):
                assert many.ended(list(promised)[-1]) is None, "nothing was under way"
                os.kill(many.gateway(), signal.SIGKILL)
                back_s.append(wait_for(lambda p=promised: tells(many, p), RECOVERY_S, "it"))
        assert set(clients.kinds) <= {"succeeded", "closed", "unready"}, clients.kinds
        assert not [a for a, fault in clients.answers if fault and a.kind == "succeeded"]
        assert clients.kinds["closed"] > 0, "nothing was open"
        assert_all_come(many, promised)
        seconds = ", ".join(f"{each:.1f}" for each in back_s)
        print(f"the gateway told again of {len(promised)} predictions after {seconds} s")
        assert max(back_s) < GATEWAY_BACK_S


@pytest.mark.parametrize("victim", ["", "raylet", "gcs_server"])
def test_what_was_promised_outlives_the_machine(
    victim: str,
    model_folder: Path,
    known: list[KnownRequest],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """All of it dies, or what Ray cannot do without; then it is started again.

    Promises are made until the gateway has ended, which takes seconds after its engines' end.
    """
    if victim and not request.config.getoption("--full"):
        pytest.skip("with --full")
    promised: Promises = {}
    for number in rounds(request):
        with running(model_folder, tmp_path, "2") as many:
            many.wait_until_ready(2)
            assert_all_come(many, promised)
            with promising(many.url, known, f"{victim}-{number}") as promised:
                wait_for_a_moment(f"{victim} {number}")
                tree = whole_tree(many.process.pid)
                for process in tree:
                    with suppress(psutil.NoSuchProcess):
                        if not victim or process.name() == victim:
                            process.kill()
                assert many.process.wait(END_S) != 0
            if victim:
                assert many.log().count(f"Ray's {victim} has ended") == number + 1
            _, left = psutil.wait_procs(tree, timeout=END_S)
            assert not left, f"it left {left}"
    started = time.monotonic()
    with running(model_folder, tmp_path, "2") as many:
        wait_for(many.health, RECOVERY_S, "the gateway")
        answered_s = time.monotonic() - started
        wait_for(many.engines, RECOVERY_S, "an engine")
        told_s = wait_for(lambda: tells(many, promised), RECOVERY_S, "what was promised")
        seconds = time.monotonic() - started
        assert_all_come(many, promised)
    print(f"{victim or 'all'}: after {answered_s:.1f} s from the start the port answered, after")
    print(f"{seconds:.1f} s it told of what it had promised, {len(promised)} predictions")
    assert told_s < GATEWAY_BACK_S


def wait_for_a_moment(name: str) -> None:
    """A random one, so that something dies while promises are still being made."""
    time.sleep(random.Random(f"{SEED} {name}").uniform(0.3, 1.5))


def tells(many: Many, promised: Promises) -> bool:
    """Whether the gateway answers, and knows what it has promised."""
    try:
        response = many.http.get(f"/v1/predictions/{next(iter(promised))}")
    except httpx.TransportError:
        return False
    return response.status_code == 200


def assert_all_come(many: Many, promised: Promises) -> None:
    """Every one reaches its end, which is the right one."""
    for id, each in promised.items():
        wait_for(lambda id=id: many.ended(id) is not None, RECOVERY_S, id)
        answer = many.ended(id)
        assert answer is not None
        assert fault_of(each, answer) is None
