"""What the tests of a gateway share: an engine on the tiny model, and a gateway before it."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.gateway.engines.engine_host import EngineHost
from deploy.gateway.engines.local_engine import LocalEngine
from deploy.gateway.front.app import make_app
from deploy.gateway.front.serving import listening, serve
from deploy.gateway.settings import GatewaySettings
from dmd2.settings import Settings


@pytest.fixture(scope="session")
def host_settings(
    model_folder: Path, server_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    """An engine's, whose LoRAs are the shared server's."""
    return Settings(
        str(model_folder),
        device="cpu",
        tune="off",
        max_batch=4,
        output_dir=tmp_path_factory.mktemp("host") / "outputs",
        lora_sources=("local",),
        lora_dir=server_folder / "loras",
    )


@pytest.fixture(scope="session")
def host(host_settings: Settings) -> Iterator[EngineHost]:
    """An engine, for all who leave it as it was."""
    host = EngineHost(host_settings)
    yield host
    host.close()


class Shared(LocalEngine):
    """A gateway's engine that others use too."""

    async def close(self) -> None:
        """Leave it to those."""


@pytest.fixture(scope="session")
def gateway_url(
    host: EngineHost, host_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Where a gateway with one engine answers, from a thread of its own."""
    settings = GatewaySettings(journal_dir=tmp_path_factory.mktemp("gateway") / "journal")
    listener = listening("127.0.0.1", 0, settings)
    running: dict[str, Any] = {}

    async def main() -> None:
        running["loop"], running["stop"] = asyncio.get_running_loop(), asyncio.Event()
        engines = Shared(host_settings, lambda _: host)
        await serve(make_app(engines, settings), listener, running["stop"])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    running["loop"].call_soon_threadsafe(running["stop"].set)
    thread.join(60)
    assert not thread.is_alive(), _where(thread, running["loop"])


def _where(thread: threading.Thread, loop: asyncio.AbstractEventLoop) -> str:
    """What holds up a thread's event loop: where the thread is, and what its tasks wait for."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join([*traceback.format_stack(frame), *map("\n{}".format, asyncio.all_tasks(loop))])
