"""The image that ways are tried on: what it costs, and what the judge says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from wrapped_models import Broken, Ticking

from dmd2.engine import batch_limits
from dmd2.fast import tuning
from dmd2.fast.budget import SETUP_S, Budget
from dmd2.fast.tuning import Tuning
from dmd2.fast.ways import WAYS, Way
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.rehearsal import choose_ways

LEAN = [way for way in WAYS if way.name == "lean"]


def choose(pipeline: Pipeline, tuning: Tuning, *ways: Way) -> None:
    request = GenerationRequest.resolve(pipeline.card, prompt="warm up", seed=0)
    choose_ways(pipeline, request, tuning, Budget(60), ways)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_judge_lets_the_exact_rewrites_pass(
    dtype: str, new_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them is used is a matter of speed; none may be too far from plain."""
    monkeypatch.setattr(tuning, "_FASTER", 1e9)
    pipeline = new_pipeline(dtype)
    choose(pipeline, Tuning("quick"), *LEAN)
    assert (pipeline.unet.way, pipeline.vae.way) == ("lean", "lean")


def test_setup_makes_no_more_than_one_image_for_it(
    own_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps and a decode, plainly, whatever is tried; and nothing at all where nothing is."""
    counted = {}
    for part, runner in (("step", own_pipeline.unet), ("decode", own_pipeline.vae)):
        counted[part] = Broken(runner.plain, lambda output: output, 0)
        monkeypatch.setattr(runner, "plain", counted[part])
    choose(own_pipeline, Tuning("quick"))
    assert {part: model.num_calls for part, model in counted.items()} == {"step": 2, "decode": 1}
    choose(own_pipeline, Tuning("off"), *LEAN)
    choose(own_pipeline, Tuning("force"))
    assert {part: model.num_calls for part, model in counted.items()} == {"step": 2, "decode": 1}


class OnAHost:
    """A model whose calls take a host so long, the first ones longer, by a clock of its own."""

    def __init__(self, model: Any, clock: list[float], seconds: list[float]) -> None:
        self._model, self._clock, self._seconds = model, clock, list(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _tick(self) -> None:
        self._clock[0] += self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        return self._model(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        return self._model.decode(*args, **kwargs)


@pytest.mark.parametrize("plain_s", [0.057, 0.102])
@pytest.mark.parametrize("cold_decode_s", [0.051, 0.3])
@pytest.mark.parametrize("timesteps", [(399,), (999, 749, 499, 249)])
def test_an_h200_gets_its_graphs_however_fast_its_host_is_just_now(
    timesteps: tuple[int, ...],
    cold_decode_s: float,
    plain_s: float,
    own_pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By what was measured there; both times of a plain step are of one run."""
    clock = [0.0]
    monkeypatch.setattr(Pipeline, "warms_up", True)
    plain, calls_s = (
        {"step": own_pipeline.unet, "decode": own_pipeline.vae},
        {
            ("step", "plain"): (0, [1.0, plain_s]),
            ("step", "graph"): (0.246, [0.771, 0.026]),
            ("step", "lean"): (0.152, [0.062, 0.060]),
            ("decode", "plain"): (0, [0.6, 0.0875]),
            ("decode", "lean"): (0.023, [cold_decode_s, 0.0377]),
        },
    )

    def fake(way: Way) -> Way:
        model, (build_s, seconds) = plain[way.part].plain, calls_s[way.part, way.name]

        def build(_: Any) -> OnAHost:
            clock[0] += build_s
            return OnAHost(model, clock, seconds)

        return replace(way, build=build, suits=lambda facts: None)

    ways = [fake(way) for way in WAYS if not way.compiles]
    for part, runner in plain.items():
        seconds = calls_s[part, "plain"][1]
        monkeypatch.setattr(runner, "plain", OnAHost(runner.plain, clock, seconds))
    card = replace(own_pipeline.card, timesteps={len(timesteps): timesteps}, default_steps=None)
    request = GenerationRequest.resolve(card, prompt="warm up", seed=0)
    choose_ways(own_pipeline, request, Tuning(), Budget(now=lambda: clock[0]), ways)
    assert (own_pipeline.unet.way, own_pipeline.vae.way) == ("graph", "lean")
    assert clock[0] <= SETUP_S + 1.6, "the first calls are not charged"


def test_plains_time_is_the_least_that_was_seen(
    own_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step met another process: by its time alone no way would be tried."""
    clock, model = [0.0], own_pipeline.unet.plain
    monkeypatch.setattr(own_pipeline.unet, "plain", OnAHost(model, clock, [0.4, 0.05]))
    way = Way("fake", "step", lambda plain: OnAHost(model, clock, [0.02]))
    request = GenerationRequest.resolve(own_pipeline.card, prompt="warm up", seed=0)
    found = choose_ways(own_pipeline, request, Tuning(), Budget(1.5, lambda: clock[0]), [way])
    assert own_pipeline.unet.way == "fake"
    assert found["step"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("step_s", "decode_s", "used"),
    [
        (0.01, 0.03, {"step", "decode"}),
        (0.1, 0.1, {"step", "decode"}),
        (0.3, 0.36, {"decode"}),
        (0.12, 0.6, {"step"}),
        (5.0, 9.0, set()),
    ],
)
@pytest.mark.parametrize("share", [0.5, 1.5])
def test_all_of_setup_keeps_to_one_budget(
    step_s: float,
    decode_s: float,
    used: set[str],
    share: float,
    own_pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ways and batches together, whatever the models and the ways take."""
    clock, ways, used = [0.0], [], used if share < 1 else set()
    # The first calls of all, and those of the batch search; a way is expected to take plain's time.
    owed, unforeseen = 0.0, 2 * max(0.0, share - 1) * max(step_s, decode_s)
    for runner, seconds in ((own_pipeline.unet, step_s), (own_pipeline.vae, decode_s)):
        model = runner.plain
        monkeypatch.setattr(runner, "plain", Ticking(model, clock, seconds))

        def build(plain: Any, model: Any = model, seconds: float = seconds * share) -> Ticking:
            return Ticking(model, clock, seconds)

        ways.append(Way("fake", runner.part, build))
        owed += seconds + seconds * (share if runner.part in used else 1)
    monkeypatch.setattr(batch_limits, "choose_ways", partial(choose_ways, ways=ways))
    batch_limits.warm_up(own_pipeline, None, None, Budget(1.5, lambda: clock[0]))
    assert clock[0] <= 1.5 + owed + unforeseen + 1e-6
    runners = (own_pipeline.unet, own_pipeline.vae)
    assert {r.part for r in runners if r.way == "fake"} == used
