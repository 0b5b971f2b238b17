"""A gateway as scripts/serve-many starts it, whose engines note what they do and die when told to.

    scripted.py ENGINES [DELAY_S] [--ray-address HOST:PORT]

SCALE_NOTES names the file of the notes, a line of JSON each. DELAY_S is how long there is too much
work, or too little, before the number of engines changes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
from dataclasses import replace

from scripted_notes import DEADLY, STUCK, note, notes

from deploy.gateway.engines.engine_host import EngineHost
from deploy.gateway.engines.fleet import Fleet
from deploy.gateway.front.app import make_app
from deploy.gateway.many.ray_serve import Site, serve
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.work import Outcome, Work
from dmd2.engine.deadlines import Deadlines
from dmd2.errors import DMD2Error
from dmd2.settings import Settings

# DMD2_QUEUE_TIMEOUT_S and DMD2_RUN_TIMEOUT_S of an engine that hangs: what it holds is late first.
LATE_S, HANGS_S = 3.0, 7.0


class ScriptedHost(EngineHost):
    """An engine that notes what it is given, and how that ended."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        note("ready")

    async def run(self, work: Work) -> Outcome:
        note("began", work.id)
        if work.request.prompt == DEADLY:
            os.kill(os.getpid(), signal.SIGSEGV)
        if work.request.prompt == STUCK and sum(n["id"] == work.id for n in notes()) == 1:
            self._hang()
        try:
            return await super().run(work)
        except asyncio.CancelledError:
            note("cancelled", work.id)
            raise
        finally:
            note("left", work.id)

    def _hang(self) -> None:
        """Have the device never end its next step, and be known to hang soon."""
        engine = self._service.engine
        engine._deadlines = Deadlines(LATE_S, HANGS_S)
        engine._pipeline.step = lambda samples: threading.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", type=Fleet.of)
    parser.add_argument("delay_s", type=float, nargs="?", default=1.0)
    parser.add_argument("--ray-address")
    options = parser.parse_args()
    fleet = replace(
        options.engines, upscale_delay_s=options.delay_s, downscale_delay_s=options.delay_s
    )
    site = Site(
        Settings.from_environment(),
        GatewaySettings.from_environment(),
        ScriptedHost,
        make_app,
        "127.0.0.1",
        int(os.environ["PORT"]),
    )
    try:
        serve(fleet, site, options.ray_address)
    except DMD2Error as error:
        sys.exit(f"dmd2-cog: {error}")


if __name__ == "__main__":
    import scripted  # whose classes engines find by that name

    scripted.main()
