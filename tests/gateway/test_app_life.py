"""The gateway over HTTP while engines come and go, queues fill and clients leave."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway.fake_engines import FakeEngines
from gateway.fronts import ASK, front, run, until

from deploy.gateway import cog_dialect, readiness
from deploy.gateway.app import make_app
from deploy.gateway.serving import listening, serve
from deploy.gateway.settings import GatewaySettings
from dmd2.errors import DMD2Error, ModelError


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
