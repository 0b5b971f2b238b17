"""scripts/page: a page in your browser that draws with a server of this repository.

Without --url it starts scripts/serve beside it, which is the bundled demo where nothing is
installed, and stops it at the end. The page listens on 127.0.0.1 alone. DMD2_API_TOKEN, where it is
set, is sent to the server as a Bearer token: whoever reaches the page uses the server with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.page.server import Health, Server

ROOT = Path(__file__).resolve().parent.parent.parent
PORT = 7860
POLL_S = 0.25
STOP_S = 10.0


def main() -> None:
    """Parse, start a server where none is named, and show the page until told to stop."""
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    try:
        with listening(options.port) as port:
            if options.url is not None:
                show(options, port, options.url)
                return
            from default_model import choose_model

            model = choose_model(options.model, os.environ)
            with own_server(model) as (url, process):
                show(options, port, url, process, name_of(model))
    except KeyboardInterrupt:
        sys.exit(130)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", help="a server that runs already, such as http://127.0.0.1:5000")
    parser.add_argument("--model", metavar="NAME|FOLDER", help="of the server that is started")
    parser.add_argument("--port", type=int, default=PORT, help=f"of the page; default: {PORT}")
    parser.add_argument("--open", action="store_true", help="open the page in the system's browser")
    options = parser.parse_args()
    if options.url is not None:
        if not options.url.startswith(("http://", "https://")):
            parser.error(f"--url {options.url}: it begins with http:// or https://")
        if options.model is not None:
            parser.error("--model is for the server that is started without --url")
    return options


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """The page's own socket, taken before anything slow begins."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            sys.exit(f"--port {port}: the page cannot listen there ({error}). Choose another")
        yield taken


@contextmanager
def own_server(model: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """scripts/serve on a free port of this machine, and its process; stopped at the end."""
    from cog_server import free_port

    port = free_port()
    environment = {k: v for k, v in os.environ.items() if k != "DMD2_API_TOKEN"}  # not for it
    command = [str(ROOT / "scripts" / "serve"), "--model", model]
    process = subprocess.Popen(command, env=environment | {"PORT": str(port)}, stdout=sys.stderr)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def name_of(model: str) -> str:
    """What a manifest's entry, or the model in a folder, is called."""
    card = Path(model) / "dmd2.json"
    named = json.loads(card.read_text(encoding="utf-8")).get("name") if card.is_file() else None
    return str(named or Path(model).name)


def show(
    options: argparse.Namespace,
    listener: socket.socket,
    url: str,
    process: subprocess.Popen[bytes] | None = None,
    model: str = "",
) -> None:
    """Wait for the server and serve the page, until a signal or the end of the server's process.

    Of a server that was set up in no time, Cog's log of that may lack the model's name.
    """
    # Before Gradio is imported: it reads these then.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="dmd2-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        import uvicorn

        from deploy.page.layout import make_app
        from deploy.page.server import Server, ServerError

        server = Server(url, os.environ.get("DMD2_API_TOKEN", ""))
        try:
            health = wait_until_set_up(server, process)
            health = replace(health, model=health.model or model)
            app = make_app(server, health, asyncio.run(server.openapi()), pictures)
        except ServerError as error:
            sys.exit(f"dmd2-cog: {error}")
        # Open pages hold connections for ever.
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        page = uvicorn.Server(config)
        # It calls each connection that the end cuts off an error.
        logging.getLogger("uvicorn.error").addFilter(lambda _: not page.should_exit)
        if process is not None:
            threading.Thread(target=end_with, args=(process, page), daemon=True).start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        print(f"dmd2-cog: the page is at {address} (server: {url}); Ctrl-C ends it", flush=True)
        if options.open:
            webbrowser.open(address)
        page.run(sockets=[listener])
    if process is not None and process.poll() is not None:
        sys.exit(f"dmd2-cog: the server ended with exit code {process.returncode}")


def wait_until_set_up(server: Server, process: subprocess.Popen[bytes] | None) -> Health:
    """The server's health once it is set up. One of ours may take its time to listen.

    Raises:
        ServerError: it does not answer, refuses, ended, or its setup failed.
    """
    from deploy.page.server import ServerError

    is_said = False
    while True:
        if process is not None and process.poll() is not None:
            raise ServerError(f"the server ended with exit code {process.returncode}")
        try:
            health = asyncio.run(server.health())
        except ServerError:
            if process is None:
                raise
        else:
            if health.status == "SETUP_FAILED":
                raise ServerError(f"the server's setup failed:\n{health.logs}")
            if health.status != "STARTING":
                return health
            if not is_said:
                print("dmd2-cog: the server is starting", file=sys.stderr, flush=True)
                is_said = True
        time.sleep(POLL_S)


def end_with(process: subprocess.Popen[bytes], page: object) -> None:
    """Have the page end once the server's process has."""
    process.wait()
    page.should_exit = True  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
