"""What a user of replicate 2.0.0b4 does, unpatched; prints what came of it as JSON.

Arguments: the gateway's address, its token, the port of a receiver of webhooks, 0 for none, and as
JSON the inputs of a cat, of what is slow, and of what fails.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from typing import Any

import replicate
from hook import Hook
from replicate import Replicate
from replicate.exceptions import ModelError


def read(output: Any) -> list[str]:
    return [base64.b64encode(file.read()).decode() for file in output]


def refused(call: Any) -> list[Any]:
    try:
        call()
    except replicate.APIStatusError as error:
        return [error.status_code, error.body["title"]]  # type: ignore[index]
    except ModelError as error:
        return [str(error)]
    raise AssertionError("nothing was refused")


def main(url: str, token: str, port: int, inputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    client = Replicate(bearer_token=token, base_url=f"{url}/v1")
    cat, slow, bad = (inputs[name] for name in ("cat", "slow", "bad"))
    done: dict[str, Any] = {"run": read(client.run("me/dmd2", input=cat | {"num_outputs": 4}))}
    if port == 0:
        return done
    done["early run"] = read(client.run("me/dmd2", wait=1, input=slow))
    made = client.models.predictions.create(
        model_owner="me", model_name="dmd2", input=cat, prefer="wait"
    )
    assert made.metrics is not None
    done["created"] = [made.status, read_urls(made.output), made.metrics.seeds]
    began = time.monotonic()
    early = client.predictions.create(version=made.version, input=slow, prefer="wait=1")
    done["seconds"] = [time.monotonic() - began]
    done["early"] = [early.status, client.predictions.wait(early.id).status]
    done["seconds"].append(time.monotonic() - began)
    placed = client.deployments.predictions.create(
        deployment_owner="you", deployment_name="place", input=cat
    )
    done["polled"] = [placed.status, placed.model, client.predictions.wait(placed.id).status]
    cut = client.models.predictions.create(model_owner="me", model_name="dmd2", input=slow)
    ended = client.predictions.cancel(prediction_id=cut.id)
    done["cancelled"] = [ended.status, client.predictions.get(prediction_id=cut.id).status]
    listed = [each.id for each in client.predictions.list()]
    done["listed"] = [listed.index(each.id) for each in (ended, placed, early, made)]
    versions: Any = client.models.versions.list(model_owner="me", model_name="dmd2")
    found = versions.results if hasattr(versions, "results") else list(versions)
    first = found[0] if isinstance(found[0], dict) else found[0].model_dump()
    model = client.models.get(model_owner="me", model_name="dmd2")
    assert model.latest_version is not None
    done["versions"] = [len(found), first["id"] == made.version == model.latest_version.id]
    done["versioned"] = read(client.run(f"me/dmd2:{first['id']}", input=cat))
    done["account"] = client.account.get().type
    wrong = Replicate(bearer_token="no", base_url=f"{url}/v1")
    done["refused"] = [
        refused(lambda: client.run("me/dmd2", input=bad)),
        refused(lambda: client.run("me/dmd2", input=cat | {"num_outputs": 5})),
        refused(lambda: client.run("me/dmd2:" + "0" * 64, input=cat)),
        refused(lambda: client.predictions.get(prediction_id="nothing")),
        refused(lambda: wrong.run("me/dmd2", input=cat)),
    ]
    hook = Hook(port)
    client.models.predictions.create(
        model_owner="me",
        model_name="dmd2",
        input=cat,
        webhook=hook.url,
        webhook_events_filter=["completed"],
    )
    _, body = hook.first()  # this client validates none
    key = client.webhooks.default.secret.get().key
    told = json.loads(body)
    done["webhook"] = [told["status"], read_urls(told["output"])] if key else []
    hook.close()
    return done


def read_urls(urls: Any) -> list[str]:
    return [url.partition(",")[2] for url in urls]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))))
