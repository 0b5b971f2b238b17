"""What a user of replicate 1.0.7 does, unpatched; prints what came of it as JSON.

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
from replicate.exceptions import ModelError, ReplicateError


def read(output: Any) -> list[str]:
    return [base64.b64encode(file.read()).decode() for file in output]


def refused(call: Any) -> list[Any]:
    try:
        call()
    except ReplicateError as error:
        return [error.status, error.title]
    except ModelError as error:
        return [str(error)]
    raise AssertionError("nothing was refused")


def main(url: str, token: str, port: int, inputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    client = replicate.Client(api_token=token, base_url=url)
    cat, slow, bad = (inputs[name] for name in ("cat", "slow", "bad"))
    done: dict[str, Any] = {"run": read(client.run("me/dmd2", cat | {"num_outputs": 4}))}
    if port == 0:
        return done
    done["early run"] = read(client.run("me/dmd2", slow, wait=1))
    made = client.models.predictions.create("me/dmd2", cat, wait=True)
    done["created"] = [made.status, read_urls(made.output), made.metrics["seeds"]]
    began = time.monotonic()
    early = client.predictions.create(version=made.version, input=slow, wait=1)
    done["seconds"], done["early"] = [time.monotonic() - began], [early.status]
    early.wait()
    done["seconds"].append(time.monotonic() - began)
    done["early"].append(early.status)
    placed = client.deployments.predictions.create("you/place", cat)
    done["polled"] = [placed.status, placed.model]
    placed.wait()
    done["polled"].append(placed.status)
    ended = client.models.predictions.create("me/dmd2", slow)
    ended.cancel()
    done["cancelled"] = [ended.status, client.predictions.get(ended.id).status]
    listed = [
        each.id for page in replicate.pagination.paginate(client.predictions.list) for each in page
    ]
    done["listed"] = [listed.index(each.id) for each in (ended, placed, early, made)]
    versions = client.models.get("me/dmd2").versions.list()
    done["versions"] = [len(versions), versions[0].id == made.version]
    done["versioned"] = read(client.run(f"me/dmd2:{versions[0].id}", cat))
    done["account"] = client.accounts.current().type
    done["refused"] = [
        refused(lambda: client.run("me/dmd2", bad)),
        refused(lambda: client.run("me/dmd2", cat | {"num_outputs": 5})),
        refused(lambda: client.run("me/dmd2:" + "0" * 64, cat)),
        refused(lambda: client.predictions.get("nothing")),
        refused(lambda: replicate.Client(api_token="no", base_url=url).run("me/dmd2", cat)),
    ]
    hook = Hook(port)
    client.models.predictions.create(
        "me/dmd2", cat, webhook=hook.url, webhook_events_filter=["completed"]
    )
    headers, body = hook.first()
    secret = client.webhooks.default.secret()
    validate = replicate.webhooks.validate
    validate(headers=headers, body=body.decode(), secret=secret, tolerance=60)
    forged = body.decode().replace("succeeded", "failed")
    try:
        validate(headers=headers, body=forged, secret=secret)
    except ValueError:
        told = json.loads(body)
        done["webhook"] = [told["status"], read_urls(told["output"])]
    hook.close()
    return done


def read_urls(urls: list[str]) -> list[str]:
    return [url.partition(",")[2] for url in urls]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))))
