"""The choice among ways, on the device that they are to run on: measured and judged beside plain.

A way is built, called for a first time, timed in turns with plain, and judged by what it returned
meanwhile, and for two images. What is not faster, not finite, not close enough, raises or finds no
time is not used.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dmd2.errors import DMD2Error
from dmd2.fast.budget import Budget
from dmd2.fast.judge import judge, limits_for
from dmd2.fast.runner import Runner, in_a_line
from dmd2.fast.ways import WAYS, Facts, Way
from dmd2.models import device_work
from dmd2.settings import TuneMode

log = logging.getLogger(__name__)

_MIN_PAIRS = 3
# Of plain's time. A median of fewer pairs, where there was no time for more, has to be clearer.
_FASTER = 0.97
_CLEARLY_FASTER = 0.9
# So far below plain that no further pair is worth its time.
_FAR_FASTER = 0.7


@dataclass(frozen=True)
class Tuning:
    """What setup is to try.

    Attributes:
        mode: DMD2_TUNE: "off" tries nothing, "quick" what the budget lets it, and "force" takes
            each way that can be built, without looking at what it does: for tests. "eager" does
            so too, but passes over ways that keep memory: what CUDA graphs leave to others.
        compile: DMD2_COMPILE: whether compiled models are tried in any mode.
    """

    mode: TuneMode = "quick"
    compile: bool = False

    @property
    def measures(self) -> bool:
        """Whether anything is timed and judged."""
        return self.mode == "quick" or self.compile

    @property
    def forces(self) -> bool:
        """Whether the first way that can be built is taken as it is."""
        return self.mode in ("force", "eager")

    def passes_over(self, way: Way) -> bool:
        """Whether a way is not even thought of in this mode."""
        if self.mode == "off":
            return not way.compiles
        return self.mode == "eager" and way.keeps_memory


@dataclass(frozen=True)
class Bench:
    """What the ways of a part are tried on.

    Attributes:
        runner: what gets the chosen way.
        facts: of its model.
        calls: of a model for one image, each on an input of its own: what is timed and judged.
        plain_s: about what plain takes for one of them.
        pair: a call for two images, which is judged alone: a way may treat them otherwise.
    """

    runner: Runner
    facts: Facts
    calls: Sequence[Callable[[Any], torch.Tensor]] = ()
    plain_s: float = 0.0
    pair: Callable[[Any], torch.Tensor] | None = None

    @property
    def num_images(self) -> int:
        """Of all calls, each made once."""
        return len(self.calls) + (0 if self.pair is None else 2)


@dataclass
class _Attempt:
    """What came of trying a way.

    Attributes:
        model: what was built.
        plain_s, way_s: of each call, in pairs.
        error: the judge's.
        problem: why it cannot be used, None where it can.
    """

    way: Way
    model: Any = None
    plain_s: list[float] = field(default_factory=list)
    way_s: list[float] = field(default_factory=list)
    error: float = math.nan
    problem: str | None = None

    @property
    def share(self) -> float:
        """Of plain's time: the median of pairs, since what else the machine does slows both."""
        pairs = zip(self.way_s, self.plain_s, strict=True)
        return statistics.median(way / max(plain, 1e-9) for way, plain in pairs)

    def beats(self, other: _Attempt) -> bool:
        """Whether it is the faster one of two that were timed."""
        return bool(other.way_s) and self.share < other.share


class _NotUsedError(Exception):
    """Why a way is not used, as the table says it."""


def tune(
    bench: Bench,
    tuning: Tuning,
    budget: Budget,
    ways: Sequence[Way] = WAYS,
) -> float:
    """Give a runner the best of the ways for its part, or none, and log the table.

    Returns:
        Seconds of a call by what was chosen, as far as it was measured.

    Raises:
        DMD2Error: a way has broken the device, so that plain cannot run either.
    """
    attempts, chosen = [], None
    for way in (way for way in ways if way.part == bench.runner.part):
        if tuning.passes_over(way):
            continue
        if chosen is not None and way.name == chosen.way.includes:
            continue
        attempt = _tried(way, bench, tuning, budget)
        attempts.append(attempt)
        worse: _Attempt | None = attempt
        if attempt.problem is None and (chosen is None or attempt.beats(chosen)):
            chosen, worse = attempt, chosen
        if worse is not None:
            worse.model = None
            device_work.give_back_memory()
        if chosen is not None and (chosen.way.compiles or tuning.forces):
            break
    _log_table(attempts, chosen)
    if chosen is None:
        return bench.plain_s
    bench.runner.adopt(chosen.way, chosen.model)
    return statistics.median(chosen.way_s) if chosen.way_s else bench.plain_s


def _tried(way: Way, bench: Bench, tuning: Tuning, budget: Budget) -> _Attempt:
    attempt = _Attempt(way, problem=way.suits(bench.facts))
    if attempt.problem is not None:
        return attempt
    try:
        if way.compiles:
            with budget.uncharged():
                unbounded = Budget(math.inf, budget.now)
                _try(attempt, bench, unbounded)
                _try_pair(attempt, bench, unbounded)
        elif tuning.forces:
            _build(attempt, bench)
        else:
            _check_fits(way, bench, budget)
            _try(attempt, bench, budget)
            _check_faster(attempt)
            _try_pair(attempt, bench, budget)
    except _NotUsedError as error:
        attempt.problem = str(error)
    except Exception as error:  # plain had worked: if it fails now, it does so beside the way
        attempt.problem = f"failed: {in_a_line(error)}"
        _end_if_broken(attempt, bench, error)
    return attempt


def _end_if_broken(attempt: _Attempt, bench: Bench, error: Exception) -> None:
    """Say how to do without a way after which the device refuses all work, plain's included."""
    if device_work.is_broken(bench.facts.device):
        way, setting = attempt.way, "DMD2_COMPILE=0" if attempt.way.compiles else "DMD2_TUNE=off"
        raise DMD2Error(
            f"way {way.name} for a {way.part} {attempt.problem}, and broke the device for this "
            f"process. Run with {setting}, which does not try it"
        ) from error


def _check_fits(way: Way, bench: Bench, budget: Budget) -> None:
    """Before anything is tried: a first call, and for each input one of plain and one of the way.

    By plain's time: an exact way is seldom slower by much, and two images than twice one.
    """
    needed = (way.first_s or bench.plain_s) + bench.plain_s * 2 * bench.num_images
    if needed > (left := budget.left()):
        raise _NotUsedError(f"not tried: it would take about {needed:.1f} s of {left:.1f} s left")


def _build(attempt: _Attempt, bench: Bench) -> None:
    # Named before it is tried: if it hangs, this is the log's last line.
    log.info("trying way %s for a %s", attempt.way.name, attempt.way.part)
    attempt.model = attempt.way.build(bench.runner.plain)


def _try(attempt: _Attempt, bench: Bench, budget: Budget) -> None:
    """Build, call, time and judge, as long as there is time."""
    _build(attempt, bench)
    _timed(bench.calls[0], attempt.model, bench, budget)
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    pair_s = 2 * bench.plain_s
    for call in itertools.cycle(bench.calls):
        if _is_settled(attempt, len(bench.calls)) or pair_s > budget.left():
            break
        expected, plain_s = _timed(call, bench.runner.plain, bench, budget)
        got, way_s = _timed(call, attempt.model, bench, budget)
        outputs.append((expected, got))
        attempt.plain_s.append(plain_s)
        attempt.way_s.append(way_s)
        pair_s = plain_s + way_s
    if len(outputs) < len(bench.calls):
        raise _NotUsedError("found no time to be judged")
    _judge(attempt, outputs, bench)


def _try_pair(attempt: _Attempt, bench: Bench, budget: Budget) -> None:
    """Judge what a way returns for two images, if there is time for it."""
    if bench.pair is None:
        return
    if 2 * (attempt.plain_s[-1] + attempt.way_s[-1]) > budget.left():
        raise _NotUsedError("found no time to be judged on two images")
    expected, _ = _timed(bench.pair, bench.runner.plain, bench, budget)
    got, _ = _timed(bench.pair, attempt.model, bench, budget)
    _judge(attempt, [(expected, got)], bench)


def _judge(
    attempt: _Attempt, outputs: Sequence[tuple[torch.Tensor, torch.Tensor]], bench: Bench
) -> None:
    """By pairs of what plain and a way returned."""
    plain, way = zip(*outputs, strict=True)
    verdict = judge(attempt.way.part, plain, way, limits_for(bench.facts))
    attempt.error = max(verdict.error, attempt.error)  # which is NaN at first
    if verdict.problem is not None:
        raise _NotUsedError(verdict.problem)


def _is_settled(attempt: _Attempt, num_calls: int) -> bool:
    """Whether there are pairs enough: each call has to be judged."""
    num_pairs = len(attempt.way_s)
    if num_pairs < num_calls:
        return False
    return num_pairs >= _MIN_PAIRS or attempt.share <= _FAR_FASTER


def _check_faster(attempt: _Attempt) -> None:
    enough = _FASTER if len(attempt.way_s) >= _MIN_PAIRS else _CLEARLY_FASTER
    if attempt.share > enough:
        raise _NotUsedError(f"is not faster: {attempt.share:.2f} of plain, {enough:g} would do")


@torch.inference_mode()
def _timed(
    call: Callable[[Any], torch.Tensor], model: Any, bench: Bench, budget: Budget
) -> tuple[torch.Tensor, float]:
    """What a call returns, and the seconds until the device has done it."""
    device_work.mark(bench.facts.device)()
    began = budget.now()
    output = call(model)
    device_work.mark(bench.facts.device)()
    return output, budget.now() - began


def _log_table(attempts: Sequence[_Attempt], chosen: _Attempt | None) -> None:
    """A line for each way that was thought of."""
    for attempt in attempts:
        outcome = attempt.problem or ("used" if attempt is chosen else "another is faster")
        way, measured = attempt.way, ""
        if attempt.way_s:
            way_ms, plain_ms = (
                1000 * statistics.median(s) for s in (attempt.way_s, attempt.plain_s)
            )
            measured = f" {way_ms:8.2f} ms, plain {plain_ms:8.2f} ms, error {attempt.error:.0e}:"
        log.info("way %-8s for a %-7s%s %s", way.name, f"{way.part}:", measured, outcome)
