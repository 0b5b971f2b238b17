"""A request on its way through the engine, and what becomes of it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from dmd2.errors import UnsafeContentError
from dmd2.fast.ways import Part
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lane import Lane
from dmd2.request.lora_rules import key_of
from dmd2.sampling.sample import Conditioning, Sample

STAGES = ("queue", "encode", "sample", "decode", "check", "save")


@dataclass(frozen=True)
class GenerationResult:
    """A finished request.

    Attributes:
        request: what was made; its seeds and size are settled.
        paths: one complete file for each image that was not withheld, in order, each with a name
            of its own that ends in the image's index.
        nsfw_scores: for each image, the safety checker's probability of "nsfw"; None where it
            was not checked, or the checker failed.
        flagged: the indices of the images that the safety checker flagged.
        withheld: those of them that have no path.
        seconds: per stage of STAGES; each lasts from the end of the one before until the last
            image of the request is through, so that they add up to the whole time.
        batch_sizes: for every UNet call that the request took part in, the images in it.
        ways: for "step" and "decode", the way that did it; several where one failed on the way.
        unread: for "prompt" and "negative_prompt", the words that no text encoder read.
        notes: for the logs, that there are such, and which images were withheld.
    """

    request: GenerationRequest
    paths: list[Path]
    nsfw_scores: list[float | None]
    flagged: list[int]
    withheld: list[int]
    seconds: dict[str, float]
    batch_sizes: list[int]
    ways: dict[str, str]
    unread: dict[str, str]
    notes: list[str]


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    Attributes:
        path: its file; None if it was withheld.
        flagged: whether the safety checker flagged it.
        nsfw_score: as in the result.
    """

    path: Path | None
    flagged: bool = False
    nsfw_score: float | None = None


@dataclass(eq=False)
class Job:
    """A request and all that is known of it; the engine's thread and those that save share it.

    Attributes:
        name: like no other's; its files lie in a folder of that name.
        started: set when it leaves the queue, or will never.
        future: of the result.
        unwanted: set when nobody waits for it any more.
        conditioning: from the first step on.
        batch_sizes: as in the result.
    """

    request: GenerationRequest
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: Future[None] = field(default_factory=Future)
    future: Future[GenerationResult] = field(default_factory=Future)
    unwanted: threading.Event = field(default_factory=threading.Event)
    conditioning: Conditioning | None = None
    batch_sizes: list[int] = field(default_factory=list)
    _arrival: float = field(default_factory=time.perf_counter)
    _ends: dict[str, float] = field(default_factory=dict)
    _outcomes: dict[int, Outcome] = field(default_factory=dict)
    _ways: dict[str, list[str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for future in (self.started, self.future):
            future.set_running_or_notify_cancel()  # whoever waits for them cannot cancel them

    @property
    def over(self) -> bool:
        """Whether no more work should go into it."""
        return self.unwanted.is_set() or self.future.done()

    @property
    def lane(self) -> Lane:
        """Of its images."""
        request = self.request
        return Lane(request.width, request.height, request.uses_guidance, key_of(request.loras))

    def ended(self, stage: str, at: float | None = None) -> None:
        """A stage is over, for all that is known: the last word counts."""
        self._ends[stage] = time.perf_counter() if at is None else at
        if stage == "queue":
            self._has_started()

    def note_ways(self, ways: Mapping[Part, Sequence[str]]) -> None:
        """What made one of its images, by part of the work."""
        for part, names in ways.items():
            self._ways[part] = list(dict.fromkeys([*self._ways.get(part, []), *names]))

    def fail(self, error: BaseException) -> None:
        """Settle the future with an error, unless it is settled."""
        with self._lock:
            self._has_started()
            if not self.future.done():
                self.future.set_exception(error)

    def settle(self, index: int, outcome: Outcome) -> None:
        """Image index is done with; the last one settles the future."""
        with self._lock:
            self._outcomes[index] = outcome
            if len(self._outcomes) < self.request.num_outputs or self.future.done():
                return
            self.ended("save")
            outcomes = [self._outcomes[index] for index in sorted(self._outcomes)]
            if all(outcome.path is None for outcome in outcomes):
                self.future.set_exception(_nothing_to_return(outcomes))
            else:
                self.future.set_result(self._result(outcomes))

    def _has_started(self) -> None:
        if not self.started.done():
            self.started.set_result(None)

    def _result(self, outcomes: list[Outcome]) -> GenerationResult:
        return GenerationResult(
            request=self.request,
            paths=[outcome.path for outcome in outcomes if outcome.path is not None],
            nsfw_scores=[outcome.nsfw_score for outcome in outcomes],
            flagged=[index for index, outcome in enumerate(outcomes) if outcome.flagged],
            withheld=[index for index, outcome in enumerate(outcomes) if outcome.path is None],
            seconds=self._seconds(),
            batch_sizes=self.batch_sizes,
            ways={part: ", ".join(names) for part, names in self._ways.items()},
            unread=self._unread(),
            notes=self._notes(outcomes),
        )

    def _seconds(self) -> dict[str, float]:
        ends = [self._arrival, *(self._ends[stage] for stage in STAGES)]
        return {stage: ends[i + 1] - ends[i] for i, stage in enumerate(STAGES)}

    def _unread(self) -> dict[str, str]:
        assert self.conditioning is not None
        embeds = self.conditioning.embeds
        names = ("negative_prompt", "prompt")[-len(embeds) :]
        return {
            name: each.truncated for name, each in zip(names, embeds, strict=True) if each.truncated
        }

    def _notes(self, outcomes: list[Outcome]) -> list[str]:
        # Cog's server copies a prediction's logs into its own, which may hold no prompt.
        return [
            f"{name} was cut at 77 tokens; the metric unread has the rest"
            for name in self._unread()
        ] + [
            f"image {index} was withheld by the safety checker ({_said_of(outcome)})"
            for index, outcome in enumerate(outcomes)
            if outcome.path is None
        ]


@dataclass(eq=False)
class JobImage:
    """One image of a job, and how far it has come.

    Attributes:
        job: whose image it is.
        index: among the job's images.
        sample: from its first step on.
        is_decoded: whether the device was given its decode.
    """

    job: Job
    index: int
    sample: Sample | None = None
    is_decoded: bool = False


def _nothing_to_return(outcomes: list[Outcome]) -> UnsafeContentError:
    said = ", ".join(_said_of(outcome) for outcome in outcomes)
    return UnsafeContentError(
        f"the safety checker withheld every image ({said}). Change the prompt or the seed, or "
        "set disable_safety_checker"
    )


def _said_of(outcome: Outcome) -> str:
    score = outcome.nsfw_score
    return "it failed" if score is None else f"nsfw {score:.3f}"
