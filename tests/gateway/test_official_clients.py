"""Replicate's own clients, unpatched, against a gateway over real sockets.

`tests/gateway/clients/install` puts them into .venv-clients; without, these are skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cog_server import free_port
from gateway.clients import COMMANDS, INSTALLED
from gateway.fake_engines import FakeEngines, picture_of, work

from deploy.gateway.front.app import make_app
from deploy.gateway.front.serving import listening, uvicorn_config
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.work import Outcome, Work

pytestmark = pytest.mark.clients

TOKEN = "a-long-random-text"


class PacedEngines(FakeEngines):
    """Take their time, or do not come to an end, as the prompt says."""

    async def run(self, work: Work) -> Outcome:
        if work.request.prompt == "slow":
            await asyncio.sleep(1.6)
        elif work.request.prompt == "stuck":
            await asyncio.sleep(60)
        elif work.request.prompt == "bad":
            return Outcome(error="GenerationError: no memory")
        return await super().run(work)


@contextmanager
def gateway(folder: Path, tls: Path | None = None, **settings: Any) -> Iterator[str]:
    """A gateway with a token on a port of loopback; gives its address."""
    port = free_port()
    url = f"http{'' if tls is None else 's'}://127.0.0.1:{port}"
    public = {} if tls is None else {"public_url": url}
    held = GatewaySettings(journal_dir=folder, api_token=TOKEN, **public, **settings)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        app = make_app(PacedEngines(), held)
        config = uvicorn_config(app)
        if tls is not None:
            config.ssl_certfile = config.ssl_keyfile = tls
        server = uvicorn.Server(config)
        async with app.router.lifespan_context(app):
            answering = asyncio.create_task(server._serve([listening("127.0.0.1", port, held)]))
            ready.set()
            await stop.wait()
            server.should_exit = True
            await answering

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(60)
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def used(client: str, url: str, port: int, **environ: str) -> dict[str, Any]:
    """What came of a client's use."""
    command = [*map(str, COMMANDS[client]), url, TOKEN, str(port)]
    clean = {name: text for name, text in os.environ.items() if "PYTHON" not in name}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**clean, **environ}
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def pictures(prompt: str = "a cat", num: int = 1) -> list[str]:
    """What the engines make, in base64."""
    made = work("x", prompt, num_outputs=num)
    return [picture_of(made, index).decode().partition(",")[2] for index in range(num)]


@pytest.mark.parametrize("client", COMMANDS)
def test_a_client_does_all_that_its_user_asks_for(tmp_path: Path, client: str) -> None:
    port = free_port()
    with gateway(tmp_path / "j", webhook_hosts=(f"http://127.0.0.1:{port}",)) as url:
        done = used(client, url, port)
    failed = "Prediction failed: GenerationError: no memory"
    assert done == {
        "run": pictures(num=4),
        "early run": pictures("slow"),
        "created": ["succeeded", pictures(), [7]],
        "early": ["starting", "succeeded"],
        "polled": ["starting", "you/place", "succeeded"],
        "cancelled": ["canceled", "canceled"],
        "listed": [0, 1, 2, 3],
        "versions": [1, True],
        "versioned": pictures(),
        "account": "organization",
        "refused": [
            [failed if client.startswith("js") else failed.removeprefix("Prediction failed: ")],
            [422, "Input validation failed"],
            [422, "Invalid version or not permitted"],
            [404, "Not found"],
            [401, "Unauthenticated"],
        ],
        "webhook": "succeeded",
    }


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
    with gateway(tmp_path / "j", tls) as url:
        assert used(client, url, 0, **trusted) == {"run": pictures(num=4)}


def test_the_clients_are_those_that_are_pinned() -> None:
    for major, version in (("1", "1.0.7"), ("2", "2.0.0b4")):
        said = "import importlib.metadata as m; print(m.version('replicate'))"
        python = INSTALLED / f"python-{major}/bin/python"
        found = subprocess.run([python, "-c", said], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == version
    package = INSTALLED / "js/node_modules/replicate/package.json"
    assert json.loads(package.read_text())["version"] == "1.4.0"
