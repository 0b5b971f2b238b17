"""Gateways for Replicate's clients, and what their users ask of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from cog_server import free_port
from gateway.fake_engines import FakeEngines, answer_to, work
from gateway.serve_many import STARTS_S, serving

from deploy.gateway.front.app import make_app
from deploy.gateway.front.serving import listening, uvicorn_config
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.work import Outcome, Work

TOKEN = "a-long-random-text"
SLOW_S = 6.0
CAT = {"prompt": "a cat", "seed": 7}
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class World:
    """A gateway that asks for TOKEN.

    Attributes:
        url: where it answers.
        hook_port: of loopback, that it may send webhooks to.
        slow: inputs that take 3 s and more.
        bad: inputs that an engine's error comes of.
        made: what must come of inputs.
    """

    url: str
    hook_port: int
    slow: Inputs
    bad: Inputs
    made: Callable[[Inputs], Outcome]

    def pictures(self, inputs: Inputs) -> list[str]:
        """What must come of inputs, in base64."""
        outputs = self.made(inputs).outputs
        assert outputs
        return [output.decode().partition(",")[2] for output in outputs]


@contextmanager
def of_fakes(folder: Path, tls: Path | None = None) -> Iterator[World]:
    """Before engines whose pictures are a prompt and a seed.

    Args:
        folder: of its journal.
        tls: a file with a certificate and its key, for outputs below a public URL.
    """
    port = free_port()
    with _before_fakes(folder, tls, webhook_hosts=(f"http://127.0.0.1:{port}",)) as url:
        slow, bad = {"prompt": "slow", "seed": 7}, {"prompt": "bad"}
        yield World(url, port, slow, bad, lambda inputs: _answer(work("x", **inputs)))


@contextmanager
def of_the_demo(folder: Path) -> Iterator[World]:
    """scripts/serve-many with the demo; what must come of inputs its other dialect says, Cog's."""
    port = free_port()
    hosts = f"http://127.0.0.1:{port}"
    more = {"DMD2_API_TOKEN": TOKEN, "DMD2_WEBHOOK_HOSTS": hosts}
    with serving("demo", folder, **more) as (url, _):
        slow = {**CAT, "num_outputs": 4, "width": 832, "height": 832}  # 6 s of a fast core
        bad = {**CAT, "lora_weights": "owner/none"}
        yield World(url, port, slow, bad, lambda inputs: _by_cogs_dialect(url, inputs))


def _by_cogs_dialect(url: str, inputs: Inputs) -> Outcome:
    token = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(trust_env=False, timeout=STARTS_S, headers=token) as http:
        said = http.post(f"{url}/predictions", json={"input": dict(inputs)}).json()
    return Outcome(tuple(map(str.encode, said.get("output", ()))), said.get("error"))


class PacedEngines(FakeEngines):
    """Take their time for what is slow."""

    async def run(self, work: Work) -> Outcome:
        if work.request.prompt == "slow":
            await asyncio.sleep(SLOW_S)
        return await super().run(work)


def _answer(work: Work) -> Outcome:
    if work.request.prompt == "bad":
        return Outcome(error="GenerationError: no memory")
    return answer_to(work)


@contextmanager
def _before_fakes(folder: Path, tls: Path | None, **settings: Any) -> Iterator[str]:
    port = free_port()
    url = f"http{'' if tls is None else 's'}://127.0.0.1:{port}"
    public = {} if tls is None else {"public_url": url}
    held = GatewaySettings(journal_dir=folder, api_token=TOKEN, **public, **settings)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        app = make_app(PacedEngines(answer=_answer), held)
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
