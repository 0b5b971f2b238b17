"""Whatever is killed under load, no prediction that was accepted is lost, and none is wrong."""

from __future__ import annotations

import os
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
from scripted_notes import DEADLY, STUCK
from soak.server_under_load import (
    KnownRequest,
    ask,
    fault_of,
    http_client,
    known_requests,
)

from dmd2.sampling.pipeline import Pipeline

pytestmark = pytest.mark.scale
NUM_CLIENTS = 64
GATEWAY_BACK_S = 10.0


@pytest.fixture(scope="module")
def known(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> list[KnownRequest]:
    return known_requests(pipeline, tmp_path_factory.mktemp("alone"), 24)


@pytest.fixture(scope="module")
def many(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    """Two engines."""
    with running(model_folder, tmp_path_factory.mktemp("many"), "2") as many:
        many.wait_until_ready(2)
        yield many


@pytest.mark.parametrize("victims", ["one engine", "both engines", "the controller"])
def test_nobody_notices_a_death(
    victims: str, many: Many, known: list[KnownRequest], request: pytest.FixtureRequest
) -> None:
    for number in rounds(request):
        many.wait_until_ready(2)
        with load(many, known, f"{victims[-9:].strip()}-{number}".replace(" ", "-")) as clients:
            time.sleep(1.0)
            pids = {"one engine": many.engines()[:1], "both engines": many.engines()}
            for pid in pids.get(victims, [many.controller()]):
                os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            many.wait_until_ready(2, RECOVERY_S)
            seconds = time.monotonic() - killed
        print_cost(victims, clients, seconds)
        assert_none_lost(clients, NUM_CLIENTS)
        if victims != "the controller":
            assert num_retried(clients) > 0, "nothing was under way"


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


def test_a_full_disk_ends_no_engine(many: Many, known: list[KnownRequest]) -> None:
    """What is asked for waits for room, which all engines here share, and costs no try."""
    many.wait_until_ready(2)
    num_loaded, outputs = len(many.notes("ready")), many.folder / "outputs"
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.write_text("no folder")
    try:
        for number in range(8):
            many.later(f"roomless-{number}", known[number])
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


def test_what_was_promised_outlives_the_gateway(
    many: Many, known: list[KnownRequest], request: pytest.FixtureRequest
) -> None:
    for number in rounds(request):
        many.wait_until_ready(2)
        promised = {f"promised-{number}-{n}": known[n % len(known)] for n in range(48)}
        with load(many, known, f"open-{number}", 16) as clients:
            for id, each in promised.items():
                many.later(id, each)
            os.kill(many.gateway(), signal.SIGKILL)
            killed = time.monotonic()
            wait_for(lambda: is_answering(many), RECOVERY_S, "the gateway")
            back_s = time.monotonic() - killed
        assert set(clients.kinds) <= {"succeeded", "closed", "unready"}, clients.kinds
        assert not [a for a, fault in clients.answers if fault and a.kind == "succeeded"]
        assert clients.kinds["closed"] > 0, "nothing was open"
        assert_all_come(many, promised)
        print(f"the gateway answered again after {back_s:.1f} s")
        assert back_s < GATEWAY_BACK_S


@pytest.mark.parametrize("victim", ["", "raylet", "gcs_server"])
def test_what_was_promised_outlives_the_machine(
    victim: str,
    model_folder: Path,
    known: list[KnownRequest],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """All of it dies, or what Ray cannot do without; then it is started again."""
    if victim and not request.config.getoption("--full"):
        pytest.skip("with --full")
    promised = {f"promised-{n}": known[n % len(known)] for n in range(48)}
    for number in rounds(request):
        with running(model_folder, tmp_path, "2") as many:
            many.wait_until_ready(2)
            if number:
                assert_all_come(many, promised)
            for id, each in promised.items():
                many.later(id, each)
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
        wait_for(lambda: is_answering(many), RECOVERY_S, "the gateway")
        seconds = time.monotonic() - started
        assert_all_come(many, promised)
    print(f"{victim or 'all'}: started again, it answered after {seconds:.1f} s")


def is_answering(many: Many) -> bool:
    try:
        return many.http.get("/v1/predictions/nothing").status_code == 404
    except httpx.TransportError:
        return False


def assert_all_come(many: Many, promised: dict[str, KnownRequest]) -> None:
    """Every one reaches its end, which is the right one."""
    for id, each in promised.items():
        wait_for(lambda id=id: many.ended(id) is not None, RECOVERY_S, id)
        answer = many.ended(id)
        assert answer is not None
        assert fault_of(each, answer) is None
