"""What Replicate's dialect refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gateway.fake_engines import FakeEngines
from gateway.v1_world import World, within

from deploy.gateway.keeping.journal_file import JournalError
from deploy.gateway.prediction import Prediction

JSON = {"Content-Type": "application/json"}


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
                assert response.headers["www-authenticate"] == "Bearer"
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
            ({"prompt": "x", "seed": None}, "input.seed"),
            ({"prompt": "x", "seed": "7"}, "input.seed"),
            ({"prompt": " "}, "input.prompt"),
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
        response = await one.client.post("/v1/predictions", content=content, headers=JSON)
        assert response.status_code == 400
        assert response.headers["content-type"] == "application/problem+json"

    within(tmp_path / "j", test)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_does_not_say_that_it_is_json_is_415(tmp_path: Path, kind: str) -> None:
    async def test(one: World) -> None:
        content, headers = b'{"input":{"prompt":"x"}}', {"Content-Type": kind}
        path = "/v1/models/me/dmd2/predictions"
        response = await one.client.post(path, content=content, headers=headers)
        assert response.status_code == 415
        assert (await one.client.get("/v1/predictions")).json()["results"] == []

    within(tmp_path / "j", test)


def test_a_body_that_is_too_long_is_413(tmp_path: Path) -> None:
    async def test(one: World) -> None:
        async def endless() -> Any:
            while True:
                yield bytes(100_000)

        response = await one.client.post("/v1/predictions", content=endless(), headers=JSON)
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


def test_no_engine_is_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.gateway.dialects.replicate_dialect._READY_WITHIN_S", 0.01)

    async def test(one: World) -> None:
        response = await one.client.get("/v1/models/me/dmd2")
        assert (response.status_code, response.json()["title"]) == (503, "Not ready")
        assert response.headers["retry-after"]

    within(tmp_path / "j", test, engines=FakeEngines(num_engines=0))


def test_whatever_breaks_is_500_as_problem_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(one: World) -> None:
        monkeypatch.setattr(one.predictions, "find", lambda id: 1 / 0)
        response = await one.client.get("/v1/predictions/x")
        assert (response.status_code, response.json()["title"]) == (500, "Internal error")
        assert "division" not in response.text

    within(tmp_path / "j", test)
