"""Open an engine and make one image in a process that has imported nothing yet.

    python -m gpu_stages.fresh_start FOLDER DEVICE STARTED

STARTED is what time.monotonic() was before this process. The last line is JSON.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
import time

# What Pipeline.load and warm_up say in setup's log.
_LOADED = re.compile(r"loaded .* in ([\d.]+) s")
_WARMED_UP = re.compile(r"warmed up in ([\d.]+) s")


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.said.append(record.getMessage())


def main(folder: str, device: str, started: float) -> None:
    """As predict.py does it: imports, open_engine, a first image."""
    from dmd2.engine.opening import open_engine
    from dmd2.request.generation_request import GenerationRequest
    from dmd2.settings import Settings

    imported, lines = time.monotonic(), Lines()
    logging.getLogger("dmd2").setLevel(logging.INFO)
    logging.getLogger("dmd2").addHandler(lines)
    with tempfile.TemporaryDirectory() as outputs:
        variables = {"DMD2_MODEL": folder, "DMD2_DEVICE": device, "DMD2_OUTPUT_DIR": outputs}
        # A folder of random weights has no card that says it needs no safety checker.
        variables["DMD2_SAFETY"] = "off"
        engine = open_engine(Settings.from_environment(variables))
        ready = time.monotonic()
        request = GenerationRequest.resolve(engine.card, prompt="a red circle", seed=7)
        engine.submit(request).result()
        ended = time.monotonic()
        engine.close()
    result = {
        "imports_s": imported - started,
        "load_s": seconds_in(lines.said, _LOADED),
        "warm_up_s": seconds_in(lines.said, _WARMED_UP),
        "ready_s": ready - started,
        "first_image_s": ended - ready,
        "total_s": ended - started,
    }
    print(json.dumps({k: round(v, 2) for k, v in result.items()} | {"log": lines.said}))


def seconds_in(lines: list[str], pattern: re.Pattern[str]) -> float:
    """The seconds that a line tells; fails where none does."""
    found = [match for line in lines if (match := pattern.search(line))]
    return float(found[0][1])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
