"""Put Cog's real server under load: images per second and latency, with batching and without.

    scripts/lib/python benchmarks/serving.py [--model sdxl-4step] [--seconds 10] [--rounds 3]

Closed loop: clients that ask again as soon as they are answered; what is refused (409) is asked
again 250 ms later, and its latency counts from the first time. Open loop: requests come at random
(Poisson), at a share of the best closed loop's images/s; a refusal is final. Small amid large: one
client asks for small images with pauses, alone and while others ask for large ones. All of it on a
server as it is by default ("on") and on one without batching ("off"), each with its own best.

images_per_s counts what ends within the measured seconds. All else is of the requests that end
within them (closed loops, large images) or come within them (the others); refused counts all 409s.
Times are of those that succeed; the server's own are medians. Of several rounds, counts are sums
and all else medians. The default model is tiny and random. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cog_server import running
from default_model import choose_model
from full_size import device_name
from random_model import write_random_model

from dmd2 import __version__
from dmd2.model_card import CARD_FILE
from dmd2.models.loading import choose_device, choose_dtype
from dmd2.settings import Settings

MODES: Mapping[str, Mapping[str, str]] = {"on": {}, "off": {"DMD2_MAX_BATCH": "1"}}
SETUP_TIMEOUT_S, RAMP_S, RETRY_S, PAUSE_S = 900, 1.0, 0.25, 0.2

Inputs = dict[str, Any]
Figures = dict[str, float | None]
Measured = dict[str, Figures]
Answers = list["Answer"]


def main() -> None:
    """Measure in rounds, every other one in reverse order; print the table and the JSON."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    options = parse_arguments()
    modes = [options.only] if options.only else list(MODES)
    with tempfile.TemporaryDirectory() as scratch:
        model = settle_model(options.model, Path(scratch))
        orders = [modes[:: (-1) ** number] for number in range(options.rounds)]
        rounds = [measure_round(order, model, options) for order in orders]
    medians = {mode: medians_of([r[mode] for r in rounds]) for mode in modes}
    print_table(medians)
    print(json.dumps(facts(model, options) | {"medians": medians, "rounds": rounds}))


def parse_arguments() -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="NAME|FOLDER", help="a manifest entry or a model folder")
    add("--concurrency", type=int, default=32, help="COG_MAX_CONCURRENCY; 32 as in the container")
    add("--clients", type=numbers, default=[1, 4, 16, 64], help="closed loops; 1,4,16,64")
    add("--loads", type=numbers, default=[50, 80, 100, 120], help="open loops, %%; 50,80,100,120")
    add("--seconds", type=float, default=10, help="measured of each, after one to ramp up; 10")
    add("--mix", type=json.loads, default=[{"num_outputs": 1}], help="JSON list of inputs, in turn")
    add("--large", type=int, default=4, help="clients that ask for 4 images each; 4")
    add("--small-size", type=int, help="side of the small images; half the model's width")
    add("--rounds", type=int, default=1, help="times that everything is measured; 1")
    add("--only", choices=tuple(MODES), help="with batching or without; both")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """The whole numbers in a text such as 1,4,16."""
    return [int(number) for number in text.split(",")]


def settle_model(asked: str | None, scratch: Path) -> str:
    """What DMD2_MODEL becomes: asked, or a random model of twice the smallest allowed size."""
    if asked is not None:
        return choose_model(asked, {})
    folder = write_random_model(scratch / "random-tiny")
    (folder / CARD_FILE).write_text(
        json.dumps({"default_size": [128, 128], "safety_checker": None}), encoding="utf-8"
    )
    return str(folder)


def measure_round(modes: Sequence[str], model: str, options: Namespace) -> dict[str, Measured]:
    """Each server's measurements; of both, on_over_off compares the images per second."""
    measured = {mode: measure_server(mode, model, options) for mode in modes}
    for name, figures in measured["on"].items() if len(modes) == 2 else ():
        on, off = figures["images_per_s"] or 0, measured["off"][name]["images_per_s"]
        figures["on_over_off"] = round(on / off, 3) if off else None
    return measured


def measure_server(mode: str, model: str, options: Namespace) -> Measured:
    """All measurements, on a server of their own; if it breaks, its log ends the program."""
    print(f"batching {mode}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as outputs:
        variables = {"DMD2_MODEL": model, "DMD2_OUTPUT_DIR": outputs, **MODES[mode]}
        variables["COG_MAX_CONCURRENCY"] = str(options.concurrency)
        log_path = Path(outputs) / "server.log"
        with log_path.open("wb") as log, running(variables, log) as server:
            try:
                server.wait_until_set_up(SETUP_TIMEOUT_S)
                metrics = server.predict(next(requests("at dawn", [{}])))["metrics"]
                size = options.small_size or metrics["width"] // 16 * 8
                return asyncio.run(measure(server.url, options, size))
            except (KeyError, RuntimeError, TimeoutError, httpx.TransportError) as error:
                sys.exit(f"{log_path.read_text(errors='replace')[-4000:]}\n{error!r}")


def requests(when: str, mix: Sequence[Inputs]) -> Iterator[Inputs]:
    """The mix's inputs in turn, for ever; no prompt comes twice, lest a cache should know it."""
    for number, inputs in enumerate(itertools.cycle(mix)):
        yield {"prompt": f"{number} lighthouses {when}", "seed": number, **inputs}


async def measure(url: str, options: Namespace, small_size: int) -> Measured:
    """All measurements by name, after a second of traffic in all slots to warm up."""
    unlimited: dict[str, Any] = {"limits": httpx.Limits(), "timeout": None}
    async with httpx.AsyncClient(base_url=url, trust_env=False, **unlimited) as client:
        await Traffic(client, 0).clients(options.concurrency, requests("at noon", options.mix))
        loops = await closed_and_open_loops(client, options)
        return loops | await small_amid_large(client, options, small_size)


async def closed_and_open_loops(client: httpx.AsyncClient, options: Namespace) -> Measured:
    """Closed loops of some clients each, then open loops at percentages of the best one's rate."""
    measured, mix = {}, requests("at sunset", options.mix)
    for number in options.clients:
        traffic, name = Traffic(client, options.seconds), f"{number} clients"
        measured[name] = traffic.figures(name, await traffic.clients(number, mix), "ended")
    best = max(figures["images_per_s"] or 0 for figures in measured.values())
    if best == 0:
        raise RuntimeError("the closed loops finished no image; try more --seconds")
    images_each = float(np.mean([inputs.get("num_outputs", 1) for inputs in options.mix]))
    for percent in options.loads:
        traffic, name = Traffic(client, options.seconds), f"{percent} % load"
        answers = await traffic.arrivals(best * percent / 100 / images_each, mix)
        offered = images_each * sum(a.asked >= traffic.begin for a in answers) / options.seconds
        measured[name] = traffic.figures(name, answers, "asked", offered_per_s=round(offered, 3))
    return measured


async def small_amid_large(client: httpx.AsyncClient, options: Namespace, size: int) -> Measured:
    """What a client's small requests get, alone and amid large ones; and what these get."""
    measured: Measured = {}
    small = requests("by moonlight", [{"width": size, "height": size}])
    large = requests("in a storm", [{"num_outputs": 4}])
    for name, num_large in ((f"{size} px alone", 0), (f"{size} px amid large", options.large)):
        traffic = Traffic(client, options.seconds)
        others = asyncio.create_task(traffic.clients(num_large, large))
        await asyncio.sleep(RAMP_S)
        measured[name] = traffic.figures(name, await traffic.clients(1, small, PAUSE_S), "asked")
    measured["large"] = traffic.figures("large", await others, "ended")
    return measured


@dataclass(frozen=True)
class Answer:
    """What became of a request; seconds are the server's own, per stage."""

    asked: float
    ended: float
    refusals: int
    error: str = ""
    images: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Traffic:
    """The requests of one measurement, which starts now and counts for seconds after a ramp."""

    client: httpx.AsyncClient
    seconds: float
    begin: float = field(default_factory=lambda: time.perf_counter() + RAMP_S)

    @property
    def end(self) -> float:
        """Of the measured seconds and of all asking, by time.perf_counter."""
        return self.begin + self.seconds

    async def clients(self, number: int, inputs: Iterator[Inputs], pause_s: float = 0) -> Answers:
        """Ask until the end, each client as soon as it is answered and has paused."""
        answers = []

        async def client() -> None:
            while (now := time.perf_counter()) < self.end:
                answers.append(await self._ask(next(inputs), now, give_up_at=self.end))
                await asyncio.sleep(pause_s)

        await asyncio.gather(*(client() for _ in range(number)))
        return answers

    async def arrivals(self, rate: float, inputs: Iterator[Inputs]) -> Answers:
        """Ask at random until the end, so many times a second, whatever is under way."""
        gaps, due, tasks = np.random.default_rng(0), time.perf_counter(), []
        while (due := due + gaps.exponential(1 / rate)) < self.end:
            await asyncio.sleep(due - time.perf_counter())
            tasks.append(asyncio.create_task(self._ask(next(inputs), due, give_up_at=due)))
        return await asyncio.gather(*tasks)

    async def _ask(self, inputs: Inputs, asked: float, give_up_at: float) -> Answer:
        refusals, ask = 0, partial(self.client.post, "/predictions", json={"input": inputs})
        try:
            while (response := await ask()).status_code == 409 and time.perf_counter() < give_up_at:
                refusals += 1
                await asyncio.sleep(RETRY_S)
        except httpx.TransportError as error:
            return Answer(asked, time.perf_counter(), refusals, repr(error))
        ended, body = time.perf_counter(), response.json()
        if response.status_code == 409:
            return Answer(asked, ended, refusals + 1)
        if body.get("status") != "succeeded":
            return Answer(asked, ended, refusals, response.text[:500])
        return Answer(asked, ended, refusals, "", len(body["output"]), body["metrics"]["seconds"])

    def figures(self, name: str, answers: Answers, moment: str, **more: float) -> Figures:
        """Figures of the answers whose moment, "asked" or "ended", counts; told as progress."""
        counted = [a for a in answers if self.begin <= getattr(a, moment) < self.end]
        good = [a for a in counted if a.images]
        errors = [a.error for a in counted if a.error]
        images = sum(a.images for a in answers if self.begin <= a.ended < self.end)
        stages = good[0].seconds if good else ()
        latencies_ms = [1000 * (a.ended - a.asked) for a in good]
        figures: Figures = {
            "images_per_s": round(images / self.seconds, 3),
            **{f"p{p}_ms": percentile(latencies_ms, p) for p in (50, 90, 95, 99)},
            "requests": len(counted),
            "refused": sum(a.refusals for a in answers if a.ended >= self.begin),
            "failed": len(errors),
            **{f"{stage}_s": percentile([a.seconds[stage] for a in good], 50) for stage in stages},
            **more,
        }
        print(f"  {name}:", *(f"{k}={v}" for k, v in figures.items()), *errors[:1], file=sys.stderr)
        return figures


def percentile(values: Sequence[float], percent: int) -> float | None:
    """None of no values; rounded to four digits after the point."""
    return round(float(np.percentile(values, percent)), 4) if values else None


def medians_of(rounds: Sequence[Measured]) -> Measured:
    """All rounds of a server in one: the sum of each count, the median of all else."""
    merged: Measured = {name: {} for name in rounds[0]}
    for name, key in dict.fromkeys((n, k) for r in rounds for n in r for k in r[n]):
        known = [value for r in rounds if (value := r[name].get(key)) is not None]
        is_count = key in ("requests", "refused", "failed")
        merged[name][key] = sum(known) if is_count else percentile(known, 50)
    return merged


def print_table(medians: Mapping[str, Measured]) -> None:
    """Markdown: a row for each measurement on each server."""
    columns = list(dict.fromkeys(k for m in medians.values() for f in m.values() for k in f))
    print("|", " | ".join(["traffic", "batching", *columns]), "|")
    print("|---" * (len(columns) + 2) + "|")
    for name in next(iter(medians.values())):
        for mode, measured in medians.items():
            cells = ("-" if (v := measured[name].get(c)) is None else f"{v:g}" for c in columns)
            print("|", " | ".join([name, mode, *cells]), "|")


def facts(model: str, options: Namespace) -> dict[str, Any]:
    """What was measured, on what, when and how."""
    settings = Settings.from_environment({**os.environ, "DMD2_MODEL": model})
    device = choose_device(settings.device)
    return {
        "benchmark": "serving",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "model": Path(model).name,
        "options": vars(options),
        "device": device_name(device),
        "dtype": str(choose_dtype(settings.dtype, device)),
        "cpus": os.cpu_count(),
        "versions": {"dmd2": __version__} | {p: version(p) for p in ("torch", "diffusers", "cog")},
    }


if __name__ == "__main__":
    main()
