"""The gateway over HTTP, through a real uvicorn, before engines that a test holds."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway.fake_engines import FakeEngines, picture_of
from gateway.fronts import ASK, ASYNC, Front, front, receiver, run, until
from prometheus_client.parser import text_string_to_metric_families

from deploy.gateway import cog_dialect, readiness
from deploy.gateway.app import make_app
from deploy.gateway.serving import listening, serve, uvicorn_config
from deploy.gateway.settings import GatewaySettings
from dmd2.errors import DMD2Error, ModelError
from dmd2.settings import ROOT


def test_an_answer_is_cogs_byte_for_byte(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path) as gateway:
            answer = await gateway.post({**ASK, "num_outputs": 2}, id="mine")
            (work,) = gateway.engines.works
            urls = ",".join(f'"{picture_of(work, index).decode()}"' for index in range(2))
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "application/json"
            assert answer.text == (
                '{"id":"mine","logs":"fake: seed 7\\n",'
                '"metrics":{"attempts":1,"model":"fake","seeds":[7,8]},'
                f'"output":[{urls}],"status":"succeeded"}}'
            )

    run(test)


def test_a_seed_is_drawn_once_and_ids_begin_with_the_cell(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path, cell="eu1") as gateway:
            answers = [(await gateway.post({"prompt": "x"})).json() for _ in range(2)]
            assert all(answer["id"].startswith("eu1-") for answer in answers)
            assert answers[0]["metrics"]["seeds"] != answers[1]["metrics"]["seeds"]

    run(test)


def test_an_engine_that_dies_is_not_noticed(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path, FakeEngines(is_held=True)) as gateway:
            asking = asyncio.create_task(gateway.post(id="one"))
            await gateway.has_asked("one")
            gateway.engines.is_held = False
            gateway.engines.kill()
            answer = (await asking).json()
            assert (answer["status"], answer["metrics"]["attempts"]) == ("succeeded", 2)

    run(test)


def test_what_breaks_a_rule_beside_the_schema_fails_without_an_engine(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path) as gateway:
            answer = await gateway.post({"prompt": "x", "width": 64}, id="bad")
            said = answer.json()
            assert answer.status_code == 200
            assert said["status"] == "failed"
            assert said["error"].startswith("InvalidRequestError: width: 64 is not allowed: ")
            assert said["id"] == "bad"
            assert said["metrics"]["attempts"] == 0
            assert set(said) == {"error", "id", "logs", "metrics", "status"}
            assert gateway.engines.asked == []
            assert gateway.predictions.ended == {("cog", "failed"): 1}

    run(test)


def test_unknown_inputs_are_left_out_and_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with front(tmp_path) as gateway:
            inputs = {**ASK, "sede": "hush", "a\nb": 1, **{f"x{n}": 0 for n in range(9)}}
            assert (await gateway.post(inputs, id="one")).json()["status"] == "succeeded"

    with caplog.at_level(logging.INFO):
        run(test)
    (line,) = [each for each in caplog.messages if "unknown" in each]
    assert line.startswith("prediction one: unknown inputs are left out: 'sede', 'a\\nb', 'x0'")
    assert line.endswith(", ...")
    assert "hush" not in caplog.text
    assert "a cat" not in caplog.text


def test_before_an_engine_is_ready(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path, FakeEngines(0), is_ready=False) as gateway:
            answer = await gateway.post()
            assert answer.status_code == 503
            assert answer.json() == {"error": cog_dialect.NOT_READY, "status": "failed"}
            assert (await gateway.http.get("/ready")).status_code == 503
            health = await gateway.health()
            assert (health["status"], health["setup"]["status"]) == ("STARTING", "starting")
            assert "completed_at" not in health["setup"]
            gateway.engines.set_ready(1)
            await until(lambda: len(gateway.engines.running) == 1)
            await asyncio.sleep(0.02)
            assert (await gateway.post()).status_code == 200
            health = await gateway.health()
            assert (health["status"], health["setup"]["status"]) == ("READY", "succeeded")
            assert (await gateway.http.get("/ready")).status_code == 200

    run(test)


def test_without_an_engine_for_long_it_is_unhealthy_and_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "PATIENCE_S", 0.3)

    async def test() -> None:
        async with front(tmp_path) as gateway:
            gateway.engines.set_ready(0)
            assert (await gateway.health())["status"] == "READY", "another may come soon"
            accepted = asyncio.create_task(gateway.post(id="early"))
            await until(lambda: gateway.predictions.num_queued == 1)
            while (await gateway.health())["status"] != "UNHEALTHY":
                await asyncio.sleep(0.02)
            answer = await gateway.post()
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert (await gateway.http.get("/ready")).status_code == 503
            gateway.engines.set_ready(1)
            assert (await accepted).json()["status"] == "succeeded", "it has waited"
            await until(lambda: gateway.engines.num_ready == 1)
            assert (await gateway.health())["status"] == "READY"

    run(test)


def test_a_full_queue_is_a_409_that_says_when_to_come_back(tmp_path: Path) -> None:
    async def test() -> None:
        engines = FakeEngines(each=1, is_held=True)
        async with front(tmp_path, engines, max_queued=1) as gateway:
            asking = [asyncio.create_task(gateway.post(id=f"id{n}")) for n in range(2)]
            await until(lambda: gateway.predictions.num_under_way == 2)
            answer = await gateway.post()
            assert answer.status_code == 409
            assert answer.json()["status"] == "failed"
            assert "DMD2_MAX_QUEUED" in answer.json()["error"]
            assert int(answer.headers["Retry-After"]) >= 1
            assert (await gateway.health())["status"] == "BUSY"
            assert (await gateway.http.get("/ready")).status_code == 200
            engines.is_held = False
            engines.finish(engines.asked[0])
            assert {(await one).json()["status"] for one in asking} == {"succeeded"}

    run(test)


def test_cancelling_by_id_what_runs_and_what_waits(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path, FakeEngines(each=1, is_held=True)) as gateway:
            runs, waits = (asyncio.create_task(gateway.post(id=id)) for id in ("runs", "waits"))
            await until(lambda: gateway.predictions.num_under_way == 2)
            for id, asking in (("waits", waits), ("runs", runs)):
                answer = await gateway.http.post(f"/predictions/{id}/cancel")
                assert (answer.status_code, answer.json()) == (200, {})
                said = (await asking).json()
                assert (said["id"], said["status"]) == (id, "canceled")
                assert "output" not in said
                assert "error" not in said
                answer = await gateway.http.post(f"/predictions/{id}/cancel")
                assert (answer.status_code, answer.json()) == (404, {})
            assert gateway.engines.asked == gateway.engines.cancelled == ["runs"]

    run(test)


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_client_that_leaves_cancels(method: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path, FakeEngines(each=1, is_held=True)) as gateway:
            path = "/predictions" if method == "POST" else "/predictions/left"
            body = {"input": ASK, "id": "left"}
            leaving = asyncio.create_task(gateway.http.request(method, path, json=body))
            await gateway.has_asked("left")
            waiting = asyncio.create_task(gateway.post(id="waits"))
            staying = asyncio.create_task(gateway.post(id="stays"))
            await until(lambda: gateway.predictions.num_under_way == 3)
            for task in (leaving, waiting):
                task.cancel()
            await gateway.has_asked("stays")
            assert gateway.engines.cancelled == ["left"]
            assert "waits" not in gateway.engines.asked
            gateway.engines.finish("stays")
            assert (await staying).json()["status"] == "succeeded"
            assert (gateway.predictions.num_queued, gateway.predictions.num_under_way) == (0, 0)

    run(test)


def test_what_is_asked_for_asynchronously_outlives_its_client(tmp_path: Path) -> None:
    async def test() -> None:
        inputs = {**ASK, "hf_api_token": "hush"}
        async with front(tmp_path, FakeEngines(is_held=True)) as gateway:
            answer = await gateway.post(inputs, id="later", headers=ASYNC)
            assert (answer.status_code, answer.json()) == (
                202, {"id": "later", "status": "starting"},
            )  # fmt: skip
            await gateway.has_asked("later")
            answer = await gateway.put("later", {"prompt": 5})
            assert answer.status_code == 202
            assert answer.json() == {
                "id": "later",
                "input": {**ASK, "hf_api_token": "[REDACTED]"},
                "logs": "",
                "metrics": {},
                "status": "processing",
            }
            gateway.engines.finish("later")
            await until(lambda: not gateway.predictions.is_under_way("later"))
            found = gateway.predictions.find("later")
            assert found is not None
            assert (found.status, found.is_journaled, len(found.files)) == ("succeeded", True, 1)
            gateway.engines.is_held = False
            again = await gateway.put("later")
            assert (again.status_code, again.json()["status"]) == (200, "succeeded")
            assert gateway.engines.asked == ["later", "later"]

    run(test)


def test_only_the_exact_preference_is_asynchronous(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path) as gateway:
            for preference in ("respond-async, wait=5", "Respond-Async", "wait"):
                answer = await gateway.post(headers={"Prefer": preference})
                assert answer.status_code == 200
            assert gateway.predictions.find(answer.json()["id"]) is None, "it is not kept"

    run(test)


def test_an_id_under_way_may_be_posted_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path, FakeEngines(is_held=True)) as gateway:
            first = asyncio.create_task(gateway.post(id="same"))
            await gateway.has_asked("same")
            gateway.engines.is_held = False
            second = (await gateway.post({**ASK, "seed": 8}, id="same")).json()
            gateway.engines.finish("same")
            assert (second["id"], second["metrics"]["seeds"]) == ("same", [8])
            assert (await first).json()["metrics"]["seeds"] == [7]

    run(test)


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


def test_no_stream_is_promised(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path) as gateway:
            accept = "application/json, text/event-stream;q=0.5"
            answer = await gateway.post({"prompt": 5}, headers={"Accept": accept})
            assert answer.status_code == 406
            assert answer.json() == {"error": cog_dialect.NO_STREAM}

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


def test_on_its_way_to_the_end_it_takes_nothing_and_answers_all(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path, FakeEngines(each=1, is_held=True)) as gateway:
            asking = [asyncio.create_task(gateway.post(id=f"id{n}")) for n in range(3)]
            await until(lambda: gateway.predictions.num_under_way == 3)
            gateway.stop.set()
            await until(lambda: gateway.predictions.is_draining)
            answer = await gateway.post()
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert (await gateway.http.get("/ready")).status_code == 503
            assert (await gateway.put("id2")).status_code == 202, "it is under way"
            gateway.engines.is_held = False
            gateway.engines.finish(gateway.engines.asked[0])
            assert {(await one).json()["status"] for one in asking} == {"succeeded"}
            await gateway.serving
            with pytest.raises(httpx.ConnectError):
                await gateway.health()

    run(test)


def test_two_gateways_do_not_share_a_journal(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path):
            settings = GatewaySettings(journal_dir=tmp_path / "journal")
            listener = listening("127.0.0.1", 0, settings)
            with pytest.raises(DMD2Error, match="journal"):
                await serve(make_app(FakeEngines(), settings), listener, asyncio.Event())
            listener.close()

    run(test)


class Hopeless(FakeEngines):
    """Engines that cannot be opened."""

    is_closed = False

    async def card(self) -> Any:
        """As Engines has it."""
        raise ModelError("unet is missing")

    async def close(self) -> None:
        """As Engines has it."""
        self.is_closed = True


def test_a_gateway_whose_engine_cannot_be_opened_ends_and_says_why(tmp_path: Path) -> None:
    async def test() -> None:
        settings, engines = GatewaySettings(journal_dir=tmp_path / "journal"), Hopeless()
        listener = listening("127.0.0.1", 0, settings)
        with pytest.raises(ModelError, match="unet is missing"):
            await serve(make_app(engines, settings), listener, asyncio.Event())
        assert engines.is_closed

    run(test)


def test_webhooks_hear_cogs_words(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            receiver() as (url, told),
            front(tmp_path, webhook_hosts=(url,)) as gateway,
        ):
            answer = await gateway.post(webhook=f"{url}/x", id="one", headers=ASYNC)
            assert answer.status_code == 202
            await until(lambda: len(told) >= 1 and told[-1]["status"] == "succeeded")
            (work,) = gateway.engines.works
            assert told[0] == {"id": "one", "logs": "", "metrics": {}, "status": "processing"}
            assert told[-1] == {
                "id": "one",
                "logs": "fake: seed 7\n",
                "metrics": {"attempts": 1, "model": "fake", "seeds": [7]},
                "output": [picture_of(work).decode()],
                "status": "succeeded",
            }
            bad = {"prompt": " "}
            answer = await gateway.post(bad, webhook=f"{url}/x", id="two", headers=ASYNC)
            assert answer.status_code == 202
            await until(lambda: told[-1]["id"] == "two")
            assert told[-1]["status"] == "failed"
            assert "visible character" in told[-1]["error"]
            refused = await gateway.post(webhook="https://elsewhere.example/")
            assert refused.status_code == 422
            assert refused.json()["detail"][0]["loc"] == ["body", "webhook"]

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


def test_a_fault_of_its_own_is_a_500_without_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with front(tmp_path) as gateway:
            monkeypatch.setattr(cog_dialect, "started", lambda id: 1 / 0)
            answer = await gateway.post({"prompt": "hush"}, headers=ASYNC)
            assert answer.status_code == 500
            assert answer.json()["status"] == "failed"
            assert "division" not in answer.text

    run(test)
    assert "ZeroDivisionError" in caplog.text
    assert "hush" not in caplog.text


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
