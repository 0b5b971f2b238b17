"""Outputs in Replicate's dialect: as files, in lists, and once they are gone."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from gateway.fake_engines import picture_of, work
from gateway.v1_world import FIELDS, PUBLIC, World, within

from deploy.gateway.keeping.outputs import Outputs


def decoded(url: str) -> bytes:
    return base64.b64decode(url.partition(";base64,")[2])


def test_the_list_goes_from_page_to_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.gateway.keeping.journal.PAGE", 2)

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
        one.client.headers["Authorization"] = "Bearer token"
        said = await one.create(num_outputs=2)
        del one.client.headers["Authorization"]
        assert said["urls"]["get"] == f"{PUBLIC}/v1/predictions/{said['id']}"
        made = work("x", num_outputs=2)
        for index, url in enumerate(said["output"]):
            assert re.fullmatch(re.escape(PUBLIC) + "/outputs/[0-9a-f]{32}[.]png", url)
            response = await one.client.get(url.removeprefix(PUBLIC))
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

    within(tmp_path / "j", test, public_url=PUBLIC, api_token="token")


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
