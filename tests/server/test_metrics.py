"""What Prometheus is told, and that no scraper can touch a request."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from cog_server import CogServer, free_port
from servers import assert_alike, images_of, scrape, worker_of

from dmd2 import __version__
from dmd2.engine.job import STAGES
from dmd2.engine.tally import EngineTally
from dmd2.errors import (
    DeadlineError,
    DMD2Error,
    GenerationError,
    InvalidRequestError,
    UnsafeContentError,
)
from dmd2.models import device_work
from dmd2.server import metrics
from dmd2.server.metrics import MetricsPort
from dmd2.server.output_space import OutputSpace
from dmd2.server.request_tally import RequestTally

INPUTS = {"prompt": "a red circle", "seed": 5, "num_outputs": 2, "width": 64, "height": 64}
LE = ("1.0", "2.0", "4.0", "8.0", "16.0", "32.0", "64.0", "+Inf")
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def added(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """By how much each counter has grown that has."""
    return {
        name: after[name] - before[name]
        for name in after
        if ("_total" in name or name.startswith(("dmd2_unit_images", "dmd2_request_duration")))
        and name.startswith("dmd2_")
        and "_bucket" not in name
        and after[name] != before[name]
    }


def settled(port: int) -> dict[str, float]:
    """What is told once there is nothing to do, which may be just after an answer."""
    deadline = time.monotonic() + 20
    while True:
        told = scrape(port)
        if not any(told[f"dmd2_{name}"] for name in ("requests_in_progress", "unit_age_seconds")):
            return told
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_request_adds(server: CogServer, metrics_port: int) -> None:
    before = settled(metrics_port)
    answer = server.predict(INPUTS)
    after = settled(metrics_port)
    seconds = answer["metrics"]["seconds"]
    assert added(before, after) == {
        'dmd2_requests_total{status="succeeded"}': 1,
        "dmd2_request_duration_seconds_count": 1,
        "dmd2_request_duration_seconds_sum": pytest.approx(sum(seconds.values()), abs=1e-3),
        "dmd2_images_total": 2,
        'dmd2_unit_images_count{kind="step"}': 4,
        'dmd2_unit_images_sum{kind="step"}': 8,
        'dmd2_unit_images_count{kind="decode"}': pytest.approx(1.5, abs=0.5),
        'dmd2_unit_images_sum{kind="decode"}': 2,
    }
    for stage in STAGES:
        name = f'dmd2_stage_duration_seconds_sum{{stage="{stage}"}}'
        assert after[name] - before[name] == pytest.approx(seconds[stage], abs=1e-4)
    assert after[f'dmd2_info{{model="tiny",version="{__version__}"}}'] == 1
    assert after["dmd2_images_queued"] == 0
    made = sum(map(len, images_of(answer)))
    assert made <= after["dmd2_output_bytes"] <= after["dmd2_output_limit_bytes"]
    assert after["process_resident_memory_bytes"] > 1e8
    assert not any("gpu" in name for name in after), "there is none"
    assert not any("circle" in name for name in after), "no prompt"


def test_what_other_ends_add(server: CogServer, metrics_port: int) -> None:
    before = settled(metrics_port)
    assert server.predict({"prompt": "  "})["status"] == "failed"
    assert added(before, settled(metrics_port)) == {'dmd2_requests_total{status="refused"}': 1}
    large = {"prompt": "unwanted", "width": 768, "height": 768, "num_outputs": 4}
    with ThreadPoolExecutor(1) as client:
        unwanted = client.submit(server.predict, large, id="counted")
        deadline = time.monotonic() + 20
        while scrape(metrics_port)["dmd2_unit_age_seconds"] == 0:
            assert time.monotonic() < deadline
        assert scrape(metrics_port)["dmd2_requests_in_progress"] == 1
        httpx.post(f"{server.url}/predictions/counted/cancel")
        assert unwanted.result()["status"] == "canceled"
    after = settled(metrics_port)
    canceled = 'dmd2_requests_total{status="canceled"}'
    assert after[canceled] - before[canceled] == 1
    assert after["dmd2_images_total"] == before["dmd2_images_total"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("seed", -1, "no", "no"), "refused"),
        (UnsafeContentError(), "withheld"),
        (DeadlineError(), "timed_out"),
        (GenerationError(), "failed"),
        (ValueError(), "failed"),
        (asyncio.CancelledError(), "canceled"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_counted_by_its_kind_and_passes(error: BaseException, status: str) -> None:
    tally = RequestTally(STAGES)
    with pytest.raises(type(error)) as raised, tally.request(3):
        raise error
    assert raised.value is error
    assert {name: n for name, n in tally.by_status.items() if n} == {status: 1}
    assert tally.in_progress == 0
    withheld = 3 if status == "withheld" else 0
    assert (tally.images, tally.flagged, tally.withheld) == (withheld,) * 3


class Numbers:
    """An engine's, as on a GPU.

    Attributes:
        port: that tells them.
        requests, engine: what it tells of.
    """

    def __init__(self, folder: Path, model: str = "tiny") -> None:
        self.number = free_port()
        self.port = MetricsPort("127.0.0.1", self.number)
        self.requests = RequestTally(STAGES)
        self.engine = EngineTally(["step", "decode"], torch.device("cpu"))
        space = OutputSpace(folder, 10**9)
        self.port.serve({"model": model}, self.requests, self.engine, space)


@pytest.fixture
def numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Numbers]:
    monkeypatch.setattr(metrics, "_LOOK_S", 0.02)
    made = Numbers(tmp_path)
    yield made
    made.port.close()


def test_histograms_are_cumulative_and_end_with_all(numbers: Numbers) -> None:
    for seconds in (0.01, 0.2, 0.2, 1000.0):
        numbers.requests.made(dict.fromkeys(STAGES, seconds / len(STAGES)), 1, 0, 0)
    for num_images in (1, 3, 3, 4, 70):
        numbers.engine.unit_done("step", num_images)
    told = scrape(numbers.number)
    durations = [n for name, n in told.items() if "request_duration_seconds_bucket" in name]
    assert durations == [1.0] * 4 + [3.0] * 11 + [4.0]
    assert told["dmd2_request_duration_seconds_sum"] == pytest.approx(1000.41)
    steps = [told[f'dmd2_unit_images_bucket{{kind="step",le="{n}"}}'] for n in LE]
    assert steps == [1, 1, 4, 4, 4, 4, 4, 5]
    assert told['dmd2_unit_images_sum{kind="step"}'] == 81
    assert told['dmd2_unit_images_count{kind="decode"}'] == 0


def test_a_gpu_s_memory_is_told(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_work, "memory_use", lambda device: (7, 80))
    numbers.engine.look_at_memory()
    told = scrape(numbers.number)
    assert told["dmd2_gpu_memory_reserved_bytes"] == 7
    assert told["dmd2_gpu_memory_total_bytes"] == 80


def test_a_scrape_that_stands_still_holds_nobody_up(numbers: Numbers, tmp_path: Path) -> None:
    """Wherever it stands, whoever has something to count or to write goes on."""
    requests, engine, space = numbers.requests, numbers.engine, OutputSpace(tmp_path, 10**9)

    def go_on() -> None:
        with requests.request(1):
            requests.made(dict.fromkeys(STAGES, 0.1), 1, 0, 0)
        engine.unit_begins()
        engine.unit_done("step", 1)
        engine.look_at_memory()
        engine.unit_ends()
        space.make_room(tmp_path, 1)
        space.written(tmp_path, 1)

    stands = 0
    for _ in metrics._Readings({"model": "tiny"}, requests, engine, space).collect():
        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        thread.join(timeout=5)
        assert not thread.is_alive()
        stands += 1
    assert stands > 10
    assert requests.by_status["succeeded"] == stands


def test_scrapes_beside_changes_see_numbers_that_only_grow(
    numbers: Numbers, tmp_path: Path
) -> None:
    done = threading.Event()

    def change() -> None:
        n = 0
        while not done.is_set():
            n = n % 500 + 1
            numbers.engine.unit_done("step", n)
            numbers.engine._queued[str(n)] = 1
            numbers.engine.left_queue(str(n - 5))

    sources = {"model": "tiny"}, numbers.requests, numbers.engine, OutputSpace(tmp_path, 10**9)
    readings, counts, began = metrics._Readings(*sources), [], time.monotonic()
    with ThreadPoolExecutor(1) as thread:
        changing = thread.submit(change)
        while time.monotonic() - began < 0.5:
            (units,) = (each for each in readings.collect() if each.name == "dmd2_unit_images")
            counts += [s.value for s in units.samples if s.name.endswith("count")][:1]
        done.set()
        changing.result(timeout=5)
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def connected(port: int, said: bytes) -> socket.socket:
    """A client that says something, and from then on nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(said)
    return client


BROKEN = {"silent": b"", "half": b"GET /metr", "deaf": GET, "no http": b"\x16\x03\x01\x00\n\n"}


def test_broken_scrapers_do_not_touch_requests(server: CogServer, metrics_port: int) -> None:
    """They hold the port, and take no more of the server than a few threads that wait."""
    expected = images_of(server.predict(INPUTS))
    worker = psutil.Process(worker_of(server))
    with ExitStack() as stack:
        # The last ones stay: the server itself ends the others.
        for said in (*BROKEN.values(), *[BROKEN["silent"], BROKEN["half"]] * 6):
            with suppress(ConnectionError):  # there was no room for another
                stack.enter_context(connected(metrics_port, said))
        for _ in range(3):
            assert_alike(images_of(server.predict(INPUTS)), expected)
            held = [c for c in worker.net_connections() if c.laddr.port == metrics_port and c.raddr]
            assert len(held) <= metrics._MAX_SCRAPES
        assert server.health()["status"] == "READY"
    assert eventually(metrics_port)["dmd2_requests_in_progress"] == 0


def eventually(port: int) -> dict[str, float]:
    """A scrape, once there is room for it."""
    deadline = time.monotonic() + 5
    while True:
        try:
            return scrape(port)
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_scrape_ends_whatever_its_client_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here the answer is larger than what the system would take for a client that reads nothing."""
    monkeypatch.setattr(metrics, "_SCRAPE_S", 0.3)
    monkeypatch.setattr(metrics, "_LOOK_S", 0.02)
    size = 8_000_000
    numbers = Numbers(tmp_path, "m" * size)
    silent, half, deaf = (connected(numbers.number, BROKEN[n]) for n in ("silent", "half", "deaf"))
    dribbling = connected(numbers.number, b"")
    began = time.monotonic()
    with suppress(ConnectionError):  # the reason why a timeout for each byte would not do
        while time.monotonic() - began < 10:
            dribbling.sendall(b"G")
            time.sleep(0.05)
    assert time.monotonic() - began < 10
    for client in (silent, half):
        assert received(client) == 0
    assert received(deaf) < size, "it was broken off"
    deadline = time.monotonic() + 5
    while numbers.port._deadlines:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setattr(metrics, "_SCRAPE_S", 10.0)
    assert (
        len(httpx.get(f"http://127.0.0.1:{numbers.number}", trust_env=False, timeout=60).content)
        > size
    )
    numbers.port.close()
    assert "scrape" not in caplog.text, "a client's faults are not the operator's"


def received(client: socket.socket) -> int:
    """How many bytes come until the connection ends, which must be soon."""
    client.settimeout(5)
    total = 0
    with client, suppress(ConnectionError):
        while data := client.recv(1 << 16):
            total += len(data)
    return total


def test_what_goes_wrong_here_is_logged(
    numbers: Numbers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numbers.engine, "unit_age_s", lambda: 1 / 0)
    with pytest.raises(httpx.RemoteProtocolError):
        scrape(numbers.number)
    assert "a scrape failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_cannot_be_had_is_named_with_its_settings(host: str, tmp_path: Path) -> None:
    number = free_port()
    first, second = MetricsPort(host, number), MetricsPort(host, number)
    with pytest.raises(httpx.ConnectError):  # nothing listens before there is something to tell
        scrape(number)
    sources: Sequence[Any] = (
        {"model": "tiny"}, RequestTally([]), EngineTally([], torch.device("cpu")),
        OutputSpace(tmp_path, 10**6),
    )  # fmt: skip
    first.serve(*sources)
    said = f"DMD2_METRICS_PORT={number} of DMD2_METRICS_HOST={host} cannot be opened: Address alr"
    with pytest.raises(DMD2Error, match=said):
        second.serve(*sources)
    with pytest.raises(DMD2Error, match=said):
        MetricsPort(host, number)
    first.close()
    with pytest.raises(DMD2Error, match=r"=192\.0\.2\.1 cannot be opened: Cannot assign"):
        MetricsPort("192.0.2.1", number)
