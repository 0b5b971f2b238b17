"""A gateway with engines on Ray against as many Cog servers behind a balancer, in turn.

    scripts/lib/python benchmarks/scale.py [--model demo] [--engines 2] [--clients 160]

Closed loop: clients that ask again as soon as they are answered, from one process, for --seconds
after a second to ramp up. Both sides run all the time; each round has both, every other round in
reverse order. images_per_s is of what ends within the measured seconds. mean_batch is how many
images shared a step, of all steps of those; max_batch is what it could have been. cpu_s_per_image
is what all processes of a side took, engines and all; where others work on the same cores, it says
more than images per second. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from cog_server import free_port, running
from default_model import choose_model

from dmd2 import __version__
from dmd2.settings import ROOT

START_S, RAMP_S, END_S = 600.0, 1.0, 120.0
GATEWAY = ROOT / "deploy" / "gateway" / "many" / "serve_many_cli.py"
BALANCER = Path(__file__).with_name("balancer.py")

Figures = dict[str, float]


@dataclass(frozen=True)
class Side:
    """Where it answers, and the processes that everything of it is below."""

    url: str
    tops: tuple[int, ...]


def main() -> None:
    """Start both sides, measure them in rounds, print the table and the JSON."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is stopped too
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as sides:
        both = {
            "gateway": sides.enter_context(gateway(options, Path(scratch))),
            "balancer": sides.enter_context(balanced_servers(options, Path(scratch))),
        }
        rounds: list[dict[str, Figures]] = []
        for number in range(options.rounds):
            order = list(both)[:: (-1) ** number]
            rounds.append({each: asyncio.run(measure(both[each], options)) for each in order})
    print_report(options, rounds)


def parse_arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="NAME|FOLDER", help="a manifest entry or a model folder")
    add("--engines", type=int, default=2, help="of the gateway, and as many servers; 2")
    add("--clients", type=int, default=160, help="that ask at once; 160")
    add("--seconds", type=float, default=15, help="measured of each round; 15")
    add("--rounds", type=int, default=4, help="4")
    add("--max-batch", type=int, help="DMD2_MAX_BATCH of both; 4 on a CPU, else measured by each")
    options = parser.parse_args()
    options.model = choose_model(options.model, os.environ)
    if options.max_batch is None and os.environ.get("DMD2_DEVICE") == "cpu":
        options.max_batch = 4
    return options


def environment(options: Namespace, folder: Path) -> dict[str, str]:
    """What both sides share: neither may choose other ways than the other."""
    cores = str(max(1, (os.cpu_count() or 1) // options.engines))  # as Ray shares them out
    given = {
        "DMD2_MODEL": options.model,
        "DMD2_OUTPUT_DIR": str(folder),
        "DMD2_TUNE": "off",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores),
    }
    if options.max_batch is not None:
        given["DMD2_MAX_BATCH"] = str(options.max_batch)
    return given


@contextmanager
def gateway(options: Namespace, scratch: Path) -> Iterator[Side]:
    """A gateway whose engines are ready."""
    port = free_port()
    own = {"PORT": str(port), "DMD2_JOURNAL_DIR": str(scratch / "journal")}
    command = [sys.executable, str(GATEWAY), "--engines", str(options.engines)]
    env = {**os.environ, **environment(options, scratch / "gateway"), **own}
    with ended_at_exit(command, env, scratch / "gateway.log") as process:
        wait_for_line(process, scratch / "gateway.log", "all engines are ready")
        yield Side(f"http://127.0.0.1:{port}", (process.pid,))


@contextmanager
def balanced_servers(options: Namespace, scratch: Path) -> Iterator[Side]:
    """A balancer before Cog servers that are set up."""
    limit = os.environ.get("COG_MAX_CONCURRENCY", "32")
    with ExitStack() as stack:
        log = stack.enter_context((scratch / "servers.log").open("wb"))
        own = {"COG_MAX_CONCURRENCY": limit, **environment(options, scratch / "servers")}
        servers = [stack.enter_context(running(own, log)) for _ in range(options.engines)]
        for server in servers:
            server.wait_until_set_up(START_S)
        port = free_port()
        command = [sys.executable, str(BALANCER), str(port), limit, *(s.url for s in servers)]
        log_file = scratch / "balancer.log"
        balancer = stack.enter_context(ended_at_exit(command, dict(os.environ), log_file))
        time.sleep(3)  # it imports little
        tops = (balancer.pid, *(server.process.pid for server in servers))
        yield Side(f"http://127.0.0.1:{port}", tops)


@contextmanager
def ended_at_exit(
    command: list[str], env: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process, which is asked to end with the body."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=file, stderr=file)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(END_S)


def wait_for_line(process: subprocess.Popen[bytes], log: Path, line: str) -> None:
    """Until a process has written a line.

    Raises:
        RuntimeError: it ended, or did not in time.
    """
    deadline = time.monotonic() + START_S
    while line not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(log.read_text(errors="replace")[-4000:])
        time.sleep(0.2)


async def measure(side: Side, options: Namespace) -> Figures:
    """One closed loop."""
    url, spent_s = side.url, cpu_s(side)
    seeds, ends = itertools.count(), list[tuple[float, list[int]]]()
    began = time.monotonic()
    first, last = began + RAMP_S, began + RAMP_S + options.seconds
    pool = httpx.Limits(max_connections=None, keepalive_expiry=60)
    async with httpx.AsyncClient(timeout=None, limits=pool, trust_env=False) as client:

        async def ask_on() -> None:
            while time.monotonic() < last:
                seed = next(seeds)
                inputs = {"prompt": f"lighthouse {seed} in a storm", "seed": seed}
                answer = await client.post(f"{url}/predictions", json={"input": inputs})
                if answer.status_code == 409:  # full, or its journal: neither side should be
                    raise RuntimeError(f"{url} refused with 409 at {options.clients} clients")
                body: dict[str, Any] = answer.json()
                if body["status"] != "succeeded":
                    raise RuntimeError(f"{url}: {body['status']}: {body.get('error')}")
                ends.append((time.monotonic(), body["metrics"]["batch_sizes"]))

        await asyncio.gather(*(ask_on() for _ in range(options.clients)))
    spent_s = cpu_s(side) - spent_s
    sizes = [each for when, steps in ends if first <= when < last for each in steps]
    num_images = sum(first <= when < last for when, _ in ends)
    return {
        "images_per_s": num_images / options.seconds,
        "mean_batch": len(sizes) / sum(1 / each for each in sizes),
        "cpu_s_per_image": spent_s / len(ends),
    }


def cpu_s(side: Side) -> float:
    """What all processes of a side have taken so far."""
    tops = [psutil.Process(pid) for pid in side.tops]
    every = {each.pid: each for top in tops for each in (top, *top.children(recursive=True))}
    times = [each.cpu_times() for each in every.values()]
    return float(sum(each.user + each.system for each in times))


def print_report(options: Namespace, rounds: list[dict[str, Figures]]) -> None:
    """The medians, side by side; as JSON with all rounds."""
    medians = {
        side: {name: statistics.median(r[side][name] for r in rounds) for name in figures}
        for side, figures in rounds[0].items()
    }
    ratios = [r["gateway"]["images_per_s"] / r["balancer"]["images_per_s"] for r in rounds]
    print(f"{'':10} images/s  mean batch  CPU s an image")
    for side, each in medians.items():
        speed, batch, spent = each["images_per_s"], each["mean_batch"], each["cpu_s_per_image"]
        print(f"{side:10} {speed:8.2f}  {batch:10.2f}  {spent:14.3f}")
    report = {
        "benchmark": "scale",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "version": __version__,
        "cpus": os.cpu_count(),
        "options": vars(options),
        "medians": medians,
        "ratio": statistics.median(ratios),
        "rounds": rounds,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
