"""Replicate's dialect over HTTP, in the shapes that its clients read."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Callable, Coroutine
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from gateway.fake_engines import CARD, FakeEngines, picture_of, settled, work
from gateway.gateways import run
from gateway.v1_world import PUBLIC, World, world

from deploy.gateway.journal_file import JournalError
from deploy.gateway.outputs import Outputs
from deploy.gateway.prediction import Prediction
from deploy.gateway.replicate_bodies import COG_VERSION, ServedModel, wait_asked
from deploy.gateway.work import Outcome
from dmd2.model_card import ModelCard
from dmd2.settings import ROOT

FIELDS = {
    "id", "model", "version", "input", "output", "logs", "error", "status", "metrics",
    "created_at", "started_at", "completed_at", "data_removed", "source", "urls",
}  # fmt: skip


def within(
    folder: Path, test: Callable[[World], Coroutine[Any, Any, None]], **settings: Any
) -> None:
    """Run a test in a world of its own."""

    async def whole() -> None:
        async with world(folder, **settings) as one:
            await test(one)

    run(whole)


def held() -> FakeEngines:
    """Engines whose work a test ends."""
    return FakeEngines(is_held=True)


def decoded(url: str) -> bytes:
    return base64.b64decode(url.partition(";base64,")[2])


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
        times = [
            datetime.fromisoformat(said[f"{name}_at"])
            for name in ("created", "started", "completed")
        ]
        assert times == sorted(times)
        assert all(said[f"{name}_at"].endswith("Z") for name in ("created", "started", "completed"))
        url = f"http://gate:5000/v1/predictions/{said['id']}"
        assert said["urls"] == {"get": url, "cancel": f"{url}/cancel", "web": url}
        metrics = said["metrics"]
        assert (metrics["seeds"], metrics["model"], metrics["attempts"]) == (
            [7, 8, 9, 10],
            "fake",
            1,
        )
        assert 0 <= metrics["predict_time"] <= metrics["total_time"] < 5
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


def test_a_wait_ends_with_the_prediction_and_a_little_before_its_time(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        creating = asyncio.create_task(one.create("wait=60"))
        while not one.engines.under_way:
            await asyncio.sleep(0.001)
        assert not creating.done()
        one.engines.finish(one.engines.asked[0])
        assert (await creating)["status"] == "succeeded"
        assert loop.time() - began < 5
        began = loop.time()
        await one.create("wait=1")
        assert 0.9 < loop.time() - began < 1.0

    within(tmp_path / "j", test, engines=held())


def test_a_failure_says_why(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        said = await one.create()
        assert (said["status"], said["error"], said["output"]) == ("failed", "no memory", None)
        assert said["logs"] == "x\n"

    engines = FakeEngines(answer=lambda _: Outcome(error="no memory", logs="x\n"))
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


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/predictions/none"),
        ("POST", "/v1/predictions/none/cancel"),
        ("GET", "/v1/files"),
        ("POST", "/v1/models/me/dmd2/versions/x/trainings"),
        ("GET", "/v1/models/me/dmd2/versions/" + "0" * 64),
        ("GET", "/v1/models/me/..."),
        ("GET", "/v1/predictions/"),
        ("GET", "/v1/"),
    ],
)
def test_what_is_not_there_is_404_as_problem_json(tmp_path: Path, method: str, path: str) -> None:
    async def test(one: World) -> None:
        response = await one.client.request(method, path)
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert (response.json()["status"], response.json()["title"]) == (404, "Not found")
        if "files" in path:
            assert "POST /v1/predictions" in response.json()["detail"]

    within(tmp_path / "j", test)


def test_a_wrong_method_is_405(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        response = await one.client.delete("/v1/predictions/x")
        assert (response.status_code, response.json()["title"]) == (405, "Method not allowed")

    within(tmp_path / "j", test)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Token"])
def test_everything_of_v1_asks_for_the_token(tmp_path: Path, scheme: str) -> None:
    async def test(one: World) -> None:
        paths = ("account", "predictions", "predictions/x", "webhooks/default/secret", "files")
        for given in ("", "tok", f"{scheme} tokem", f"{scheme} ", "Basic token", f"{scheme}token"):
            for path in paths:
                response = await one.client.get(f"/v1/{path}", headers={"Authorization": given})
                assert response.status_code == 401, (given, path)
                assert response.json()["title"] == "Unauthenticated"
        response = await one.post("/v1/models/a/b/predictions", {"input": {"prompt": "x"}})
        assert response.status_code == 401
        assert one.engines.asked == []
        one.client.headers["Authorization"] = f"{scheme} token"
        assert (await one.get("/v1/account"))["type"] == "organization"

    within(tmp_path / "j", test, api_token="token")


def test_wrong_inputs_are_422_and_name_the_field(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        for inputs, field in (
            ({"prompt": "x", "num_outputs": 9}, "input.num_outputs"),
            ({}, "input.prompt"),
        ):
            response = await one.post("/v1/models/me/dmd2/predictions", {"input": inputs})
            said = response.json()
            assert (response.status_code, said["status"]) == (422, 422)
            assert said["title"] == "Input validation failed"
            assert [each["field"] for each in said["invalid_fields"]] == [field]
            assert said["detail"].startswith(f"- {field}: ")
            assert not said["detail"].startswith(f"- {field}: {field[6:]}:")
        assert one.engines.asked == []

    within(tmp_path / "j", test)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": ["x"]}, "input"),
        ({"input": {"prompt": "x"}, "webhook": "https://hooks.test/"}, "webhook"),
        ({"input": {"prompt": "x"}, "webhook_completed": "https://a/"}, "webhook_completed"),
    ],
)
def test_a_wrong_body_is_422(tmp_path: Path, body: dict[str, Any], field: str) -> None:
    async def test(one: World) -> None:
        response = await one.post("/v1/models/me/dmd2/predictions", body)
        assert response.status_code == 422
        assert response.json()["invalid_fields"][0]["field"] == field

    within(tmp_path / "j", test)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 50_000, b'"x"'])
def test_what_is_no_json_object_is_400(tmp_path: Path, content: bytes) -> None:
    async def test(one: World) -> None:
        response = await one.client.post("/v1/predictions", content=content)
        assert response.status_code == 400
        assert response.headers["content-type"] == "application/problem+json"

    within(tmp_path / "j", test)


def test_a_body_that_is_too_long_is_413(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        async def endless() -> Any:
            while True:
                yield bytes(100_000)

        response = await one.client.post("/v1/predictions", content=endless())
        assert response.status_code == 413

    within(tmp_path / "j", test)


@pytest.mark.parametrize("name", ["Prefer", "Cancel_After"])
def test_a_header_that_asks_for_too_much_is_422(tmp_path: Path, name: str) -> None:
    async def test(one: World) -> None:
        body = {"input": {"prompt": "x"}}
        response = await one.post("/v1/models/a/b/predictions", body, **{name: "wait=61"})
        assert response.status_code == 422
        assert response.json()["invalid_fields"][0]["field"] == name.replace("_", "-")
        assert one.engines.asked == []

    within(tmp_path / "j", test)


def test_a_full_queue_is_429_and_says_when_to_come_again(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        await one.create("")
        response = await one.post("/v1/models/a/b/predictions", {"input": {"prompt": "x"}})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert "DMD2_MAX_QUEUED" in response.json()["detail"]

    within(tmp_path / "j", test, engines=FakeEngines(each=1, is_held=True), max_queued=0)


def test_a_gateway_that_ends_takes_nothing_and_still_answers(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        said = await one.create()
        await one.predictions.drain()
        response = await one.post("/v1/models/a/b/predictions", {"input": {"prompt": "x"}})
        assert response.status_code == 503
        assert "retry-after" in response.headers
        assert (await one.get(f"/v1/predictions/{said['id']}"))["status"] == "succeeded"

    within(tmp_path / "j", test)


def test_a_journal_that_cannot_be_written_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_: Prediction) -> None:
        raise JournalError(f"{tmp_path}: the disk is full")

    async def test(one: World) -> None:
        monkeypatch.setattr(one.journal, "accepted", refuse)
        response = await one.post("/v1/models/a/b/predictions", {"input": {"prompt": "secret cat"}})
        assert response.status_code == 503
        assert str(tmp_path) not in response.text
        assert one.engines.asked == []
        assert "secret cat" not in caplog.text

    within(tmp_path / "j", test)


def test_a_version_names_the_model_in_three_ways(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        id = (await one.get("/v1/models/me/dmd2/versions"))["results"][0]["id"]
        for version, model in (
            (id, "dmd2/fake"),
            ("you/other", "you/other"),
            (f"you/other:{id}", "you/other"),
        ):
            body = {"version": version, "input": {"prompt": "x"}}
            response = await one.post("/v1/predictions", body)
            assert response.status_code == 201, version
            assert (response.json()["version"], response.json()["model"]) == (id, model)
        for version in (
            "0" * 64,
            id[:12],
            f"a/b:{id[1:]}0",
            "",
            ":",
            "a/b/c",
            f"x:a/b:{id}",
            "x:a/b",
        ):
            body = {"version": version, "input": {"prompt": "x"}}
            response = await one.post("/v1/predictions", body)
            assert response.status_code == 422, version
            assert response.json()["title"] == "Invalid version or not permitted"
            assert id in response.json()["detail"]
        for version in (None, 7):
            body = {"version": version, "input": {"prompt": "x"}}
            response = await one.post("/v1/predictions", body)
            assert response.json()["invalid_fields"][0]["field"] == "version"

    within(tmp_path / "j", test)


def test_a_gateway_answers_to_the_names_that_it_serves(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        body = {"input": {"prompt": "x"}}
        for kind in ("models", "deployments"):
            for name, status in (("me/sdxl", 201), ("me/other", 404), ("you/sdxl", 404)):
                response = await one.post(f"/v1/{kind}/{name}/predictions", body)
                assert response.status_code == status, (kind, name)
        version = (await one.get("/v1/models/me/sdxl"))["latest_version"]["id"]
        for asked, status in ((version, 201), ("me/sdxl", 201), (f"you/sdxl:{version}", 422)):
            response = await one.post("/v1/predictions", body | {"version": asked})
            assert response.status_code == status
            if status == 201:
                assert response.json()["model"] == "me/sdxl"
        assert (await one.client.get("/v1/models/me/other/versions")).status_code == 404

    within(tmp_path / "j", test, serves=("me/sdxl", "me/alias"))


def test_the_only_version_has_the_schema_and_cogs_version(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        listed = await one.get("/v1/models/me/dmd2/versions")
        assert (listed["previous"], listed["next"]) == (None, None)
        (version,) = listed["results"]
        assert version == await one.get(f"/v1/models/me/dmd2/versions/{version['id']}")
        model = await one.get("/v1/models/me/dmd2")
        assert model["latest_version"] == version
        assert (model["owner"], model["name"], model["visibility"]) == ("me", "dmd2", "private")
        assert model["run_count"] == 0
        inputs = version["openapi_schema"]["components"]["schemas"]["Input"]
        assert "prompt" in inputs["properties"]
        datetime.fromisoformat(version["created_at"])
        await one.create()
        assert (await one.get("/v1/models/me/dmd2"))["run_count"] == 1

    within(tmp_path / "j", test)
    assert f"cog=={COG_VERSION}" in (ROOT / "requirements-dev.txt").read_text().splitlines()


def test_versions_tell_models_apart_and_stay_over_restarts() -> None:
    def version(card: ModelCard) -> str:
        return ServedModel(card, {}).version

    assert version(CARD) == version(CARD)
    others = [
        ModelCard("other", CARD.timesteps, CARD.default_size),
        ModelCard(CARD.name, {1: (399,)}, CARD.default_size),
        ModelCard(CARD.name, CARD.timesteps, (512, 512)),
        ModelCard(CARD.name, CARD.timesteps, CARD.default_size, community_steps={2: (999, 499)}),
    ]
    assert len({version(card) for card in [CARD, *others]}) == 5
    folder = ModelCard("my model!", CARD.timesteps, CARD.default_size)
    assert ServedModel(folder, {}).name == "dmd2/my-model-"


def test_no_engine_is_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.gateway.replicate_dialect._READY_WITHIN_S", 0.01)

    async def test(one: World) -> None:
        response = await one.client.get("/v1/models/me/dmd2")
        assert (response.status_code, response.json()["title"]) == (503, "Not ready")
        assert response.headers["retry-after"]

    within(tmp_path / "j", test, engines=FakeEngines(num_engines=0))


def test_the_list_goes_from_page_to_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.gateway.journal.PAGE", 2)

    async def test(one: World) -> None:
        assert await one.get("/v1/predictions") == {"previous": None, "next": None, "results": []}
        made = [(await one.create(seed=seed))["id"] for seed in range(5)]
        pages = [await one.get("/v1/predictions")]
        while pages[-1]["next"]:
            pages.append(await one.get(pages[-1]["next"].removeprefix("http://gate:5000")))
        assert [[each["id"] for each in page["results"]] for page in pages] == [
            [made[4], made[3]],
            [made[2], made[1]],
            [made[0]],
        ]
        assert pages[0]["previous"] is None
        back = await one.get(pages[2]["previous"].removeprefix("http://gate:5000"))
        assert back["results"] == pages[1]["results"]
        entry = pages[0]["results"][0]
        assert entry.keys() == FIELDS
        assert (entry["status"], entry["output"]) == ("succeeded", None)
        response = await one.client.get("/v1/predictions?cursor=x")
        assert response.status_code == 422
        assert response.json()["invalid_fields"][0]["field"] == "cursor"

    within(tmp_path / "j", test)


def test_below_a_public_url_outputs_are_https_files(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        said = await one.create(num_outputs=2)
        assert said["urls"]["get"] == f"{PUBLIC}/v1/predictions/{said['id']}"
        made = work("x", num_outputs=2)
        for index, url in enumerate(said["output"]):
            assert re.fullmatch(re.escape(PUBLIC) + "/outputs/[0-9a-f]{32}[.]png", url)
            response = await one.client.get(url.removeprefix(PUBLIC))  # bears no token
            assert response.status_code == 200
            assert response.headers["content-type"] == "image/png"
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.content == decoded(picture_of(made, index).decode())
        for path in ("/outputs/", "/outputs", "/outputs/" + "0" * 32 + ".png", "/outputs/..%2fx"):
            assert (await one.client.get(path)).status_code == 404, path
        name = said["output"][0].rpartition("/")[2]
        for wrong in (f"{name}.part", name[:-4], f"%2e/{name}", f"../outputs/{name}x"):
            assert (await one.client.get(f"/outputs/{wrong}")).status_code == 404, wrong
        one.client.headers["Authorization"] = "Bearer token"
        listed = (await one.get("/v1/predictions"))["results"]
        assert listed[0]["output"] == said["output"]
        assert await one.get(f"/v1/predictions/{said['id']}") == said

    async def with_token(one: World) -> None:
        one.client.headers["Authorization"] = "Bearer token"
        post = one.post

        async def post_and_forget(*args: Any, **kwargs: Any) -> Any:
            response = await post(*args, **kwargs)
            del one.client.headers["Authorization"]
            return response

        one.post = post_and_forget  # type: ignore[method-assign]
        await test(one)

    within(tmp_path / "j", with_token, public_url=PUBLIC, api_token="token")


def test_without_a_public_url_nobody_gets_files(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        said = await one.create()
        (name,) = one.predictions.find(said["id"]).files  # type: ignore[union-attr]
        assert (await one.client.get(f"/outputs/{name}")).status_code == 404
        assert said["output"][0].startswith("data:image/png;base64,")

    within(tmp_path / "j", test)


@pytest.mark.parametrize("public_url", ["", PUBLIC])
def test_what_was_removed_says_so(tmp_path: Path, public_url: str) -> None:
    async def test(one: World) -> None:
        said = await one.create()
        one.journal.sweep(-1, 1)
        for later in (
            await one.get(f"/v1/predictions/{said['id']}"),
            (await one.get("/v1/predictions"))["results"][0],
        ):
            assert (later["data_removed"], later["output"], later["input"]) == (True, None, {})
            assert (later["status"], later["logs"]) == ("succeeded", "")

    within(tmp_path / "j", test, public_url=public_url)


def test_a_file_that_vanished_is_data_removed(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        said = await one.create()
        outputs: Outputs = one.journal.outputs
        outputs.remove(one.predictions.find(said["id"]).files)  # type: ignore[union-attr]
        later = await one.get(f"/v1/predictions/{said['id']}")
        assert (later["status"], later["data_removed"], later["output"]) == (
            "succeeded",
            True,
            None,
        )

    within(tmp_path / "j", test)


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


def test_whatever_breaks_is_500_as_problem_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(one: World) -> None:
        monkeypatch.setattr(one.predictions, "find", lambda id: 1 / 0)
        response = await one.client.get("/v1/predictions/x")
        assert (response.status_code, response.json()["title"]) == (500, "Internal error")
        assert "division" not in response.text

    within(tmp_path / "j", test)


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
