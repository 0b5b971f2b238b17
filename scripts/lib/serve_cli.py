"""scripts/serve: Cog's server in the foreground on this checkout, without Docker.

Listens on 127.0.0.1:$PORT (5000). DMD2_MODEL, DMD2_DEVICE, DMD2_DTYPE, COG_MAX_CONCURRENCY and the
other variables of the README come from the environment. Ends when the server ends, with its code.
"""

from __future__ import annotations

import argparse
import os


def main() -> None:
    """Become the server."""
    parser = argparse.ArgumentParser(
        prog="scripts/serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="NAME|FOLDER", help="in place of DMD2_MODEL")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    options = parser.parse_args()
    from cog_schema import write_schema
    from cog_server import server_command, server_environment
    from default_model import choose_model

    from dmd2.settings import ROOT

    environment = {"PORT": "5000"} | server_environment(
        {"DMD2_MODEL": choose_model(options.model, os.environ)}
    )
    write_schema(ROOT)
    os.chdir(ROOT)
    command = server_command(options.host)
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main()
