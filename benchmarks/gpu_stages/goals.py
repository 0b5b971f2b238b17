"""What a GPU is to reach, and what it did. No torch.

The goals are of an H200 at 1024x1024, 4 steps, full VAE, no guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# What each stage measured, by its name; a stage that failed is not in it.
Results = Mapping[str, Mapping[str, Any]]
Figure = Callable[[Results], float | None]


@dataclass(frozen=True)
class Goal:
    """One figure.

    Attributes:
        name: with its unit.
        must: what it has to reach.
        good: what it ought to.
        figure: it, out of what was measured; KeyError where its stage failed.
        more_is_better: whether it has to be at least, or at most, as much.
    """

    name: str
    must: float
    good: float
    figure: Figure
    more_is_better: bool = False

    def verdict(self, measured: float | None) -> str:
        """In a word."""
        if measured is None:
            return "not measured"
        sign = 1 if self.more_is_better else -1
        if sign * measured >= sign * self.good:
            return "good"
        return "reached" if sign * measured >= sign * self.must else "missed"


def best(part: str) -> Figure:
    """Milliseconds of one image by the fastest way that passes, or by plain."""

    def figure(results: Results) -> float:
        rows = (row for row in results["ways"]["rows"] if row["part"] == part)
        ones = [row for row in rows if row["batch"] == 1 and row["verdict"] in ("plain", "passes")]
        return float(min(row["ms"] for row in ones))

    return figure


def clients(stage: str, number: int, name: str) -> Figure:
    """A figure of the engine under so many clients."""
    return lambda results: next(
        row[name] for row in results[stage]["rows"] if row["clients"] == number
    )


def gpu_part_ms(results: Results) -> float:
    """Of one image by ours, from its prompt to its pixels on the host."""
    rows = results["peers"]["rows"]
    row = next(row for row in rows if row["peer"] == "ours" and row["batch"] == 1)
    return round(row["encode_ms"] + row["sample_ms"] + row["decode_ms"], 2)


def over_plain(results: Results) -> float:
    """Images a second of 16 clients, over the plain way's."""
    ours, plain = (clients(stage, 16, "images_per_s") for stage in ("engine", "engine-plain"))
    return round((ours(results) or 0.0) / (plain(results) or 0.0), 3)


GOALS = (
    Goal("decode of one image, ms", 36, 30, best("decode")),
    Goal("UNet step of one image, ms", 22, 19, best("step")),
    Goal("one image, prompt to pixels, ms", 125, 110, gpu_part_ms),
    Goal("one image, prompt to PNG file, ms", 140, 125, clients("engine", 1, "p50_ms")),
    Goal("images/s to PNG of 16 clients, over plain's", 1.4, 1.4, over_plain, True),
    Goal("images/s to PNG, 16 clients", 0, 10.5, clients("engine", 16, "images_per_s"), True),
    Goal("memory reserved, one client, GB", 9.5, 9.0, clients("engine", 1, "peak_reserved_gb")),
    Goal("choice of ways at setup, s", 2.0, 1.2, lambda results: results["ways"]["tuning_s"]),
    Goal("latency of stock diffusers over ours", 3, 5, lambda r: r["peers"]["latency_ratio"], True),
    Goal("our throughput over stock's", 4, 5, lambda r: r["peers"]["throughput_ratio"], True),
)


def compare(results: Results) -> list[dict[str, Any]]:
    """Each goal beside what was measured, None where the stage that measures it failed."""
    rows = []
    for goal in GOALS:
        try:
            measured = goal.figure(results)
        except (KeyError, IndexError, StopIteration, TypeError, ValueError, ZeroDivisionError):
            measured = None
        about = {"goal": goal.name, "must": goal.must, "good": goal.good}
        rows.append(about | {"measured": measured, "verdict": goal.verdict(measured)})
    return rows
