"""The gateway over HTTP, through a real uvicorn: what becomes of what is asked."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from gateway.fake_engines import FakeEngines, picture_of
from gateway.fronts import ASK, ASYNC, Front, front, receiver, run, until

from deploy.gateway.dialects import cog_dialect


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


BAD = {"prompt": "x", "width": 64}


def test_what_fails_asynchronously_can_be_looked_at(tmp_path: Path) -> None:
    """Also where an older prediction of its id succeeded, and after a restart."""

    async def test() -> None:
        async with front(tmp_path) as gateway:
            await gateway.put("used", **ASYNC)
            await until(lambda: not gateway.predictions.is_under_way("used"))
            for id in ("used", "new"):
                answer = await gateway.put(id, BAD, **ASYNC)
                assert (answer.status_code, answer.json()["status"]) == (202, "starting")
                await until(lambda id=id: not gateway.predictions.is_under_way(id))  # type: ignore[misc]
            assert gateway.predictions.ended["cog", "failed"] == 2
            await looked_at(gateway)
        async with front(tmp_path) as gateway:
            await looked_at(gateway)
            assert gateway.engines.asked == []

    async def looked_at(gateway: Front) -> None:
        for id in ("used", "new"):
            said = (await gateway.http.get(f"/v1/predictions/{id}")).json()
            assert (said["status"], said["input"]) == ("failed", BAD)
            assert said["error"].startswith("InvalidRequestError: width: 64 is not allowed: ")
            assert said["output"] is None

    run(test)


@pytest.mark.parametrize(("inputs", "status"), [(ASK, "succeeded"), (BAD, "failed")])
def test_an_id_that_is_used_again_shows_no_older_prediction(
    inputs: dict[str, Any], status: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with front(tmp_path) as gateway:
            await gateway.put("one", **ASYNC)
            await until(lambda: not gateway.predictions.is_under_way("one"))
            assert (await gateway.http.get("/v1/predictions/one")).json()["output"]
            assert (await gateway.put("one", inputs)).json()["status"] == status
            assert (await gateway.http.get("/v1/predictions/one")).status_code == 404
        assert list((tmp_path / "journal" / "outputs").iterdir()) == []

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


def test_no_stream_is_promised(tmp_path: Path) -> None:
    async def test() -> None:
        async with front(tmp_path) as gateway:
            accept = "application/json, text/event-stream;q=0.5"
            answer = await gateway.post({"prompt": 5}, headers={"Accept": accept})
            assert answer.status_code == 406
            assert answer.json() == {"error": cog_dialect.NO_STREAM}

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
