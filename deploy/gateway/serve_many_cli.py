"""scripts/serve-many: a gateway before one engine or many.

It answers clients of Cog's server and of Replicate, has what is too much for the moment wait, and
keeps what was asked for asynchronously over its own end. With one engine all is in this process;
from two on Ray runs them, one on each GPU, and its packages (about 400 MB) are installed into
.venv-gateway on first use.

Listens on 127.0.0.1:$PORT (5000). DMD2_MODEL, DMD2_API_TOKEN, DMD2_MAX_QUEUED and the other
variables of the README come from the environment. SIGTERM and Ctrl-C have it answer what it has
accepted, refuse what comes, and end; a second one ends it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.gateway.settings import GatewaySettings
    from dmd2.settings import Settings

ONE = "1"


def main() -> None:
    """Parse, and serve until told to end."""
    options = parse_arguments()
    from dmd2.errors import DMD2Error

    try:
        if options.engines == ONE:
            serve_one(options)
        else:
            serve_many(options)
    except DMD2Error as error:
        sys.exit(f"dmd2-cog: {error}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/serve-many",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--engines",
        metavar="N|MIN-MAX",
        default=ONE,
        help="how many; two numbers have it follow the load; default: 1, without Ray",
    )
    parser.add_argument("--model", metavar="NAME|FOLDER", help="in place of DMD2_MODEL")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="of a Ray cluster that is there")
    options = parser.parse_args()
    if options.ray_address is not None and options.engines == ONE:
        parser.error("--ray-address is for engines that Ray runs: give --engines 2 or more")
    return options


def serve_one(options: argparse.Namespace) -> None:
    """Serve with one engine in this process.

    Raises:
        DMD2Error: it cannot be done, and the message says why.
    """
    settings, gateway, port = read_environment(options)
    from deploy.gateway.serving import listening
    from dmd2.server import logs

    logs.configure(settings.log_format)
    listener = listening(options.host, port, gateway)
    asyncio.run(_serve_one(settings, gateway, listener))
    logging.shutdown()
    os._exit(0)  # all is closed; taking apart what a model's packages have imported takes seconds


async def _serve_one(settings: Settings, gateway: GatewaySettings, listener: socket.socket) -> None:
    from deploy.gateway.app import make_app
    from deploy.gateway.local_engine import LocalEngine
    from deploy.gateway.serving import serve

    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell(number: int) -> None:
        loop.remove_signal_handler(number)  # so that a second one ends it at once
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, tell, number)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"dmd2-cog: the gateway is at http://{shown}:{port}", file=sys.stderr, flush=True)
    await serve(make_app(LocalEngine(settings), gateway), listener, stop)


def serve_many(options: argparse.Namespace) -> None:
    """Serve with engines that Ray runs, by a Python that has Ray: another one, if this has not.

    Raises:
        DMD2Error: it cannot be done, and the message says why.
    """
    from deploy.gateway.fleet import Fleet

    fleet = Fleet.of(options.engines)
    settings, gateway, port = read_environment(options)
    become_a_python_with_ray()
    from deploy.gateway.app import make_app
    from deploy.gateway.ray_serve import Site, engine_host, serve
    from dmd2.server import logs

    logs.configure(settings.log_format)
    site = Site(settings, gateway, engine_host, make_app, options.host, port)
    serve(fleet, site, options.ray_address)


def read_environment(options: argparse.Namespace) -> tuple[Settings, GatewaySettings, int]:
    """The engine's settings, the gateway's, and the port; this process has the container's
    variables from then on, where it has no others.

    Raises:
        DMD2Error: a variable holds what it may not, or the port would be open to all.
    """
    from cog_server import AS_IN_CONTAINER, server_environment
    from default_model import choose_model

    from deploy.gateway.serving import check_host
    from deploy.gateway.settings import GatewaySettings
    from dmd2.settings import Settings

    gateway = GatewaySettings.from_environment()
    check_host(options.host, gateway)
    port = port_of(os.environ)
    os.environ |= server_environment({"DMD2_MODEL": choose_model(options.model, os.environ)})
    runpy.run_path(str(AS_IN_CONTAINER / "sitecustomize.py"))  # for this process, which began
    return Settings.from_environment(), gateway, port


def port_of(environ: Mapping[str, str]) -> int:
    """PORT, or 5000.

    Raises:
        DMD2Error: it is no port.
    """
    from dmd2.errors import DMD2Error

    text = environ.get("PORT", "5000")
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65_535:
        raise DMD2Error(f"PORT={text!r} is not a port, from 1 to 65535")
    return int(text)


def become_a_python_with_ray() -> None:
    """Go on as the Python of .venv-gateway, which is made on first use, unless this one has Ray."""
    from importlib.util import find_spec

    if find_spec("ray") is not None:
        return
    import environment

    python = environment.ready(environment.gateway())
    os.execve(python, [str(python), *sys.argv], os.environ)


if __name__ == "__main__":
    main()
