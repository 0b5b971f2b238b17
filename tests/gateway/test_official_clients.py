"""Replicate's own clients, unpatched, against a gateway over real sockets.

`tests/gateway/clients/install` puts them into .venv-clients; without, these are skipped.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway.clients import COMMANDS, INSTALLED
from gateway.clients.worlds import CAT, TOKEN, World, of_fakes, of_the_demo

from dmd2.settings import ROOT

pytestmark = pytest.mark.clients

WORLDS = {"fakes": of_fakes, "demo": of_the_demo}
FOUR_CATS = {**CAT, "num_outputs": 4}


@pytest.fixture(scope="module", params=WORLDS)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """A gateway for all tests that ask for it."""
    with WORLDS[request.param](tmp_path_factory.mktemp(request.param)) as world:
        yield world


def environment(**more: str) -> dict[str, str]:
    """A user's, which knows nothing of the tests' own Python."""
    return {name: text for name, text in os.environ.items() if "PYTHON" not in name} | more


def used(client: str, world: World, port: int, **more: str) -> dict[str, Any]:
    """What came of a client's use; the port is its webhooks', 0 for a single run."""
    inputs = json.dumps({"cat": CAT, "slow": world.slow, "bad": world.bad})
    command = [*map(str, COMMANDS[client]), world.url, TOKEN, str(port), inputs]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=environment(**more)
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("client", COMMANDS)
def test_a_client_does_all_that_its_user_asks_for(world: World, client: str) -> None:
    done = used(client, world, world.hook_port)
    early_s, whole_s = done.pop("seconds")
    assert 0.9 < early_s < 3 < whole_s, "a wait of 1 s for what takes longer"
    error = world.made(world.bad).error
    cat = world.pictures(CAT)
    assert done == {
        "run": world.pictures(FOUR_CATS),
        "early run": world.pictures(world.slow),
        "created": ["succeeded", cat, [7]],
        "early": ["starting", "succeeded"],
        "polled": ["starting", "you/place", "succeeded"],
        "cancelled": ["canceled", "canceled"],
        "listed": [0, 1, 2, 3],
        "versions": [1, True],
        "versioned": cat,
        "account": "organization",
        "refused": [
            [f"Prediction failed: {error}" if client.startswith("js") else error],
            [422, "Input validation failed"],
            [422, "Invalid version or not permitted"],
            [404, "Not found"],
            [401, "Unauthenticated"],
        ],
        "webhook": ["succeeded", cat],
    }


@pytest.mark.parametrize("world", ["demo"], indirect=True)
@pytest.mark.parametrize("document", ["README.md", "docs/scale.md"])
def test_the_documents_python_works_as_it_is_written(
    world: World, document: str, tmp_path: Path
) -> None:
    (code,) = re.findall(r"```python\n(import replicate\b.*?)```", read(document), re.DOTALL)
    code = code.replace("http://127.0.0.1:5000", world.url).replace('"..."', repr(TOKEN))
    command = [INSTALLED / "python-1/bin/python", "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=600, env=environment())
    written = base64.b64encode((tmp_path / "lighthouse.png").read_bytes()).decode()
    assert [written] == world.pictures({"prompt": "a lighthouse in a storm", "seed": 7})


@pytest.mark.parametrize("world", ["demo"], indirect=True)
def test_the_documents_curl_works_as_it_is_written(world: World) -> None:
    (code,) = re.findall(r"```sh\n(curl [^`]*/v1/.*?)```", read("docs/scale.md"), re.DOTALL)
    code = code.replace("localhost:5000", world.url)
    done = subprocess.run(
        ["bash", "-c", code],
        capture_output=True,
        check=True,
        timeout=600,
        env=environment(DMD2_API_TOKEN=TOKEN),
    )
    said = json.loads(done.stdout)
    assert said["status"] == "succeeded"
    outputs = [output.partition(",")[2] for output in said["output"]]
    assert outputs == world.pictures({"prompt": "a fox", "seed": 7})


def read(document: str) -> str:
    """The text of a document."""
    return (ROOT / document).read_text()


@pytest.mark.parametrize("client", COMMANDS)
def test_a_client_reads_outputs_below_a_public_url(tmp_path: Path, client: str) -> None:
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x "
        "-addext subjectAltName=IP:127.0.0.1 -keyout key -out certificate"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    tls = tmp_path / "both"
    certificate = tmp_path / "certificate"
    tls.write_bytes(certificate.read_bytes() + (tmp_path / "key").read_bytes())
    trusted = {"SSL_CERT_FILE": str(certificate), "NODE_EXTRA_CA_CERTS": str(certificate)}
    with of_fakes(tmp_path / "j", tls) as world:
        assert used(client, world, 0, **trusted) == {"run": world.pictures(FOUR_CATS)}


def test_the_clients_are_those_that_are_pinned() -> None:
    for major, version in (("1", "1.0.7"), ("2", "2.0.0b4")):
        said = "import importlib.metadata as m; print(m.version('replicate'))"
        python = INSTALLED / f"python-{major}/bin/python"
        found = subprocess.run([python, "-c", said], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == version
    package = INSTALLED / "js/node_modules/replicate/package.json"
    assert json.loads(package.read_text())["version"] == "1.4.0"
