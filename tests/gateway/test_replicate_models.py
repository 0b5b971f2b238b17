"""The model and its version, as Replicate's dialect shows them."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from gateway.fake_engines import CARD
from gateway.v1_world import World, within

from deploy.gateway.dialects.replicate_bodies import ServedModel
from dmd2.model_card import ModelCard


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
        assert re.fullmatch("[0-9.]+", version["cog_version"])
        await one.create()
        assert (await one.get("/v1/models/me/dmd2"))["run_count"] == 1

    within(tmp_path / "j", test)


def test_versions_tell_models_apart_and_stay_over_restarts() -> None:
    def version(card: ModelCard) -> str:
        return ServedModel(card, {}, "1").version

    assert version(CARD) == version(CARD)
    others = [
        ModelCard("other", CARD.timesteps, CARD.default_size),
        ModelCard(CARD.name, {1: (399,)}, CARD.default_size),
        ModelCard(CARD.name, CARD.timesteps, (512, 512)),
        ModelCard(CARD.name, CARD.timesteps, CARD.default_size, community_steps={2: (999, 499)}),
    ]
    assert len({version(card) for card in [CARD, *others]}) == 5
    folder = ModelCard("my model!", CARD.timesteps, CARD.default_size)
    assert ServedModel(folder, {}, "1").name == "dmd2/my-model-"
