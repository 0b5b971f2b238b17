"""The gateway over HTTP: who may ask, how much, where, and what probes and scrapers see."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway.fake_engines import FakeEngines
from gateway.fronts import ASK, Front, front, run, until
from prometheus_client.parser import text_string_to_metric_families

from deploy.gateway.app import make_app
from deploy.gateway.serving import listening, uvicorn_config
from deploy.gateway.settings import GatewaySettings
from dmd2.errors import DMD2Error
from dmd2.settings import ROOT

BAD_IDS = ("", ".", "a" * 65, "../x", "a/b", "é", "a b", "a\n")


def test_ids_are_checked_in_the_body_and_in_the_address(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path) as gateway:
            for id in BAD_IDS:
                answer = await gateway.post(id=id)
                assert answer.status_code == 422
                assert answer.json()["detail"][0]["loc"] == ["body", "id"]
            for path in ("a%20b", "a" * 65, "%2e", "%C3%A9"):
                assert (await gateway.put(path)).status_code == 422
            for path in ("..%2Fx", "a%2Fb"):
                assert (await gateway.put(path)).status_code == 404
            for id in ("a" * 64, "A-z_0"):
                assert (await gateway.post(id=id)).json()["id"] == id
            answer = await gateway.http.put("/predictions/a", json={"input": ASK, "id": "b"})
            assert answer.status_code == 422
            assert "must match" in answer.text

    run(test)


async def pieces(num_bytes: int) -> AsyncIterator[bytes]:
    for _ in range(num_bytes // 1000):
        yield b" " * 1000


def test_a_body_of_more_than_a_megabyte_is_not_read_to_its_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path) as gateway:
            head = {"Content-Type": "application/json"}
            body = json.dumps({"input": ASK}).encode()
            long = body + b" " * (1_000_000 - len(body))
            answer = await gateway.http.post("/predictions", content=long, headers=head)
            assert answer.status_code == 200
            answer = await gateway.http.post("/predictions", content=long + b" ", headers=head)
            assert answer.status_code == 413
            assert "1 MB" in answer.json()["error"]
            answer = await gateway.http.post(
                "/predictions", content=pieces(1_100_000), headers=head
            )
            assert answer.status_code == 413
            assert gateway.predictions.num_under_way == 0

    run(test)


def test_who_leaves_within_a_body_is_forgotten(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path) as gateway:
            url = gateway.http.base_url
            _, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(
                b"POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 40\r\n\r\n{"
            )
            await writer.drain()
            writer.close()
            assert (await gateway.post()).status_code == 200

    run(test)


WRONG = (
    "", "Bearer", "Bearer wrong", "Basic sesame", "sesame", "Bearer sesame2", "Bearer s\xe9same",
)  # fmt: skip


def test_whoever_has_no_token_sees_health_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path, api_token="sesame") as gateway:
            for header in WRONG:
                headers = {"Authorization": header.encode("latin-1")}
                for path in ("/health-check", "/ready"):
                    assert (await gateway.http.get(path, headers=headers)).status_code == 200
                for path in ("/", "/openapi.json", "/metrics", "/nothing", "/v1/account"):
                    answer = await gateway.http.get(path, headers=headers)
                    assert answer.status_code == 401
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                for path in ("/predictions", "/predictions/x/cancel"):
                    answer = await gateway.http.post(path, headers=headers, json={"input": ASK})
                    assert answer.status_code == 401
            assert gateway.engines.asked == []
            for header in ("Bearer sesame", "bearer  sesame"):
                answer = await gateway.post(headers={"Authorization": header})
                assert answer.status_code == 200

    run(test)


def test_numbers_for_prometheus(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path, FakeEngines(each=1, is_held=True), max_queued=5) as gateway:
            asking = [asyncio.create_task(gateway.post(id=f"id{n}")) for n in range(3)]
            await until(lambda: gateway.predictions.num_under_way == 3)
            await gateway.http.post("/predictions/id2/cancel")
            await asking[2]
            told = await numbers(gateway)
            assert {name: told[name] for name in told if name.startswith("dmd2_gateway")} == {
                "dmd2_gateway_queue": 1,
                "dmd2_gateway_queue_limit": 5,
                "dmd2_gateway_in_progress": 2,
                "dmd2_gateway_engines_ready": 1,
                "dmd2_gateway_capacity": 1,
                "dmd2_gateway_attempts_total{why=new}": 1,
                "dmd2_gateway_predictions_total{dialect=cog,status=canceled}": 1,
            }
            assert told["process_resident_memory_bytes"] > 1e6
            gateway.engines.is_held = False
            gateway.engines.finish(gateway.engines.asked[0])
            await asyncio.gather(*asking)

    run(test)


async def numbers(gateway: Front) -> dict[str, float]:
    answer = await gateway.http.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    samples = [sample for family in families for sample in family.samples]
    return {named(sample.name, sample.labels): sample.value for sample in samples}


def named(name: str, labels: dict[str, str]) -> str:
    listed = ",".join(f"{label}={value}" for label, value in labels.items())
    return f"{name}{{{listed}}}" if labels else name


def test_connections_outlive_their_clients_pools(tmp_path: Path) -> None:
    config = uvicorn_config(make_app(FakeEngines(), GatewaySettings(journal_dir=tmp_path)))
    assert config.timeout_keep_alive >= 75
    assert config.h11_max_incomplete_event_size == 256_000


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_no_port_is_open_to_others_without_a_token(host: str) -> None:
    with pytest.raises(DMD2Error, match="DMD2_API_TOKEN is not set"):
        listening(host, 0, GatewaySettings())


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(DMD2Error, match=f"port {port} of 127.0.0.1 cannot be listened on"):
            listening("127.0.0.1", port, GatewaySettings())
    for host in ("127.0.0.1", "localhost"):
        listening(host, 0, GatewaySettings()).close()
    listening("0.0.0.0", 0, GatewaySettings(api_token="sesame")).close()


def test_a_gateway_imports_neither_torch_nor_ray() -> None:
    code = "import sys, deploy.gateway.app; print({'torch', 'ray'} & set(sys.modules))"
    path = f"{ROOT}:{ROOT / 'scripts' / 'lib'}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr
