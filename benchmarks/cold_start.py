"""From starting the server to READY, and to the first image: seconds, and where they go.

    scripts/lib/python benchmarks/cold_start.py [--model demo] [--starts 3]

The model's weights must be installed. The first start reads them from the disk, or from what the
system still holds in memory; drop its caches before to measure a cold disk. DMD2_COMPILE=1 and the
other variables of the README act as for a server. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import torch
from cog_server import running

from dmd2 import __version__
from dmd2.settings import ROOT

# What Pipeline.load and warm_up say in setup's log.
_LOADED = re.compile(r"loaded .* in ([\d.]+) s")
_MEASURED = re.compile(r"warmed up in ([\d.]+) s")
_IMPORTS = "import predict"


def main() -> None:
    """Start the server a few times and report medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="a manifest entry or a model folder")
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    starts = [one_start(options.model) for _ in range(options.starts)]
    medians = {name: round(statistics.median(s[name] for s in starts), 2) for name in starts[0]}
    for name, seconds in medians.items():
        each = " ".join(f"{start[name]:.2f}" for start in starts)
        print(f"{name:>16} {seconds:7.2f} s   of {each}")
    report = {
        "benchmark": "cold_start",
        "model": options.model,
        "starts": options.starts,
        "settings": {k: v for k, v in os.environ.items() if k.startswith("DMD2_")},
        "medians_s": medians,
        "device": device_name(),
        "versions": {
            "dmd2": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    print(json.dumps(report))


def one_start(model: str) -> dict[str, float]:
    """Seconds from the start of the server to READY and to the first image, and their parts."""
    imports_s = import_seconds()
    started = time.perf_counter()
    with Path(os.devnull).open("wb") as log, running({"DMD2_MODEL": model}, log) as server:
        health = server.wait_until_set_up(1800)
        ready_s = time.perf_counter() - started
        if health["status"] != "READY":
            sys.exit(f"setup failed:\n{health['setup']['logs']}")
        answer = server.predict({"prompt": "a red circle on a blue background", "seed": 7})
        first_image_s = time.perf_counter() - started
        if answer["status"] != "succeeded":
            sys.exit(f"the prediction failed: {answer}")
    logs = health["setup"]["logs"]
    return {
        "imports": imports_s,
        "load weights": seconds_in(logs, _LOADED),
        "warm up": seconds_in(logs, _MEASURED),
        "ready": ready_s,
        "first image": first_image_s,
    }


def import_seconds() -> float:
    """How long a Python takes to start and import the predictor, which every start does first."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", _IMPORTS], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def seconds_in(logs: str, pattern: re.Pattern[str]) -> float:
    """The seconds that a line of the log tells; 0 where there is no such line."""
    found = pattern.search(logs)
    return float(found[1]) if found else 0.0


def device_name() -> str:
    """The device as people know it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


if __name__ == "__main__":
    main()
