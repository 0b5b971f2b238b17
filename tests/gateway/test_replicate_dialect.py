"""Predictions in Replicate's dialect over HTTP, in the shapes that its clients read."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from gateway.fake_engines import FakeEngines, picture_of, settled, work
from gateway.v1_world import FIELDS, World, held, within

from deploy.gateway.dialects.replicate_bodies import wait_asked
from deploy.gateway.prediction import Prediction
from deploy.gateway.work import Outcome


def test_a_prediction_that_is_waited_for_has_every_field(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        said = await one.create(num_outputs=4)
        assert said.keys() == FIELDS
        assert (said["status"], said["error"], said["source"]) == ("succeeded", None, "api")
        assert said["model"] == "me/dmd2"
        assert re.fullmatch("[0-9a-f]{64}", said["version"])
        assert said["input"] == {"prompt": "a cat", "seed": 7, "num_outputs": 4}
        made = work("x", num_outputs=4)
        assert said["output"] == [picture_of(made, index).decode() for index in range(4)]
        assert said["logs"] == "fake: seed 7\n"
        assert said["data_removed"] is False
        times = [said[f"{name}_at"] for name in ("created", "started", "completed")]
        assert times == sorted(times)
        assert all(re.fullmatch(r"2\d{3}-\d\d-\d\dT[0-9:]{8}[.]\d{6}Z", time) for time in times)
        url = f"http://gate:5000/v1/predictions/{said['id']}"
        assert said["urls"] == {"get": url, "cancel": f"{url}/cancel", "web": url}
        metrics = said["metrics"]
        assert (metrics["seeds"], metrics["model"], metrics["attempts"]) == (
            [7, 8, 9, 10],
            "fake",
            1,
        )
        created, started, completed = map(datetime.fromisoformat, times)
        assert metrics["total_time"] == (completed - created).total_seconds() > 0
        assert metrics["predict_time"] == (completed - started).total_seconds() > 0
        assert await one.get(f"/v1/predictions/{said['id']}") == said

    within(tmp_path / "j", test)


def test_a_wait_that_ends_early_says_starting_and_never_processing(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        for wait in ("wait=1", ""):
            said = await one.create(wait)
            await settled()
            assert (said["status"], said["output"], said["started_at"]) == ("starting", None, None)
            assert said["metrics"] == {}
            while said["id"] not in one.engines.under_way:
                await asyncio.sleep(0.001)
            said = await one.get(f"/v1/predictions/{said['id']}")
            assert said["status"] == "processing"
            assert said["started_at"] is not None
            one.engines.finish(said["id"])
            await one.predictions.wait(one.predictions.find(said["id"]), 5)  # type: ignore[arg-type]
            assert (await one.get(f"/v1/predictions/{said['id']}"))["status"] == "succeeded"

    within(tmp_path / "j", test, engines=held())


def test_a_wait_ends_with_the_prediction(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        creating = asyncio.create_task(one.create("wait=60"))
        while not one.engines.under_way:
            await asyncio.sleep(0.001)
        assert not creating.done()
        one.engines.finish(one.engines.asked[0])
        assert (await asyncio.wait_for(creating, 10))["status"] == "succeeded"

    within(tmp_path / "j", test, engines=held())


def test_a_wait_ends_a_little_before_its_time_from_the_first_byte_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(one: World) -> None:
        async def wait(_: Prediction, timeout_s: float | None) -> None:
            assert timeout_s is not None
            waits_s.append(timeout_s)

        async def slowly() -> AsyncIterator[bytes]:
            await asyncio.sleep(0.3)
            yield b'{"input": {"prompt": "x"}}'

        monkeypatch.setattr(one.predictions, "wait", wait)
        waits_s: list[float] = []
        for seconds in (1, 60):
            headers = {"Prefer": f"wait={seconds}"}
            path = "/v1/models/a/b/predictions"
            response = await one.client.post(
                path, content=slowly(), headers=headers | {"Content-Type": "application/json"}
            )
            assert response.status_code == 201
        assert 0 <= waits_s[0] < 0.7
        assert 30 < waits_s[1] < 58.8

    within(tmp_path / "j", test)


def test_a_failure_says_why(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        said = await one.create()
        assert (said["status"], said["error"], said["output"]) == ("failed", "no memory", None)
        assert said["logs"] == "x\n"

    engines = FakeEngines(answer=lambda _: Outcome(error="no memory", logs="x\n"))
    within(tmp_path / "j", test, engines=engines)


def test_an_engines_own_predict_time_stays(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        assert (await one.create())["metrics"]["predict_time"] == 0.25

    engines = FakeEngines(answer=lambda _: Outcome(metrics={"predict_time": 0.25}))
    within(tmp_path / "j", test, engines=engines)


def test_cancelling_ends_it_and_says_so(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        said = await one.create("")
        for _ in range(2):  # what is over stays as it is
            response = await one.client.post(f"/v1/predictions/{said['id']}/cancel")
            assert response.status_code == 200
            assert response.json()["status"] == "canceled"
            assert response.json()["output"] is None
        assert one.predictions.num_under_way == 0

    within(tmp_path / "j", test, engines=held())


def test_a_token_is_echoed_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(one: World) -> None:
        said = await one.create(
            lora_weights="https://u:pw12@h.test/x.safetensors?key=hush", hf_api_token="hf_hush"
        )
        assert said["input"]["hf_api_token"] == "[REDACTED]"
        assert one.engines.works[0].loras.hf_api_token == "hf_hush"
        listed = await one.get("/v1/predictions")
        shown = json.dumps([said, listed, await one.get(f"/v1/predictions/{said['id']}")])
        assert "hush" not in shown
        assert "pw12" not in shown
        assert "hush" not in caplog.text

    within(tmp_path / "j", test)


def test_a_new_gateway_knows_what_the_old_one_did(tmp_path: Path) -> None:
    async def old(one: World) -> None:
        said.update(await one.create(num_outputs=2))

    async def new(one: World) -> None:
        assert await one.get(f"/v1/predictions/{said['id']}") == said

    said: dict[str, Any] = {}
    within(tmp_path / "j", old)
    within(tmp_path / "j", new)


@pytest.mark.parametrize(
    ("prefer", "wait_s"),
    [
        ("", None),
        ("wait", 60),
        ("wait=5", 5),
        ("respond-async, wait=7", 7),
        ('wait="9"', 9),
        ("respond-async", None),
        ("await=3", None),
        ("wait=1.5", None),
    ],
)
def test_prefer_is_read_as_rfc_7240_has_it(prefer: str, wait_s: int | None) -> None:
    assert wait_asked(prefer) == wait_s


@pytest.mark.parametrize("prefer", ["wait=0", "wait=61", "wait=999999999"])
def test_a_wait_has_its_bounds(prefer: str) -> None:
    with pytest.raises(ValueError, match="1 to 60"):
        wait_asked(prefer)
