"""A request on its way through the engine, and what becomes of it."""

from __future__ import annotations

import threading
import time
import uuid
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from dmd2.pipeline import Conditioning, Sample
from dmd2.request import GenerationRequest
from dmd2.scheduling import Lane

STAGES = ("queue", "encode", "sample", "decode", "save")


@dataclass(frozen=True)
class GenerationResult:
    """A finished request.

    Attributes:
        request: what was made; its seeds and size are settled.
        paths: one complete file an image, in order, each with a name of its own.
        seconds: per stage of STAGES; each lasts from the end of the one before until the last
            image of the request is through, so that they add up to the whole time.
        batch_sizes: for every UNet call that the request took part in, the images in it.
        notes: for the logs, which words of a prompt the text encoders did not read.
    """

    request: GenerationRequest
    paths: list[Path]
    seconds: dict[str, float]
    batch_sizes: list[int]
    notes: list[str]


@dataclass(eq=False)
class Job:
    """A request and all that is known of it; the engine's thread and those that save share it.

    Attributes:
        name: like no other's; its files lie in a folder of that name.
        future: of the result.
        unwanted: set when nobody waits for it any more.
        conditioning: from the first step on.
        batch_sizes: as in the result.
    """

    request: GenerationRequest
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    future: Future[GenerationResult] = field(default_factory=Future)
    unwanted: threading.Event = field(default_factory=threading.Event)
    conditioning: Conditioning | None = None
    batch_sizes: list[int] = field(default_factory=list)
    _arrival: float = field(default_factory=time.perf_counter)
    _ends: dict[str, float] = field(default_factory=dict)
    _paths: dict[int, Path] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def over(self) -> bool:
        """Whether no more work should go into it."""
        return self.unwanted.is_set() or self.future.done()

    @property
    def lane(self) -> Lane:
        """Of its images."""
        request = self.request
        return Lane(request.width, request.height, request.uses_guidance)

    def ended(self, stage: str) -> None:
        """A stage is over, for all that is known: the last word counts."""
        self._ends[stage] = time.perf_counter()

    def fail(self, error: BaseException) -> None:
        """Settle the future with an error, unless it is settled."""
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)

    def saved(self, index: int, path: Path) -> None:
        """Image index has its file; the last one settles the future."""
        with self._lock:
            self._paths[index] = path
            if len(self._paths) < self.request.num_outputs or self.future.done():
                return
            self.ended("save")
            paths = [self._paths[index] for index in sorted(self._paths)]
            self.future.set_result(
                GenerationResult(
                    self.request, paths, self._seconds(), self.batch_sizes, self._notes()
                )
            )

    def _seconds(self) -> dict[str, float]:
        ends = [self._arrival, *(self._ends[stage] for stage in STAGES)]
        return {stage: ends[i + 1] - ends[i] for i, stage in enumerate(STAGES)}

    def _notes(self) -> list[str]:
        assert self.conditioning is not None
        embeds = self.conditioning.embeds
        names = ("negative prompt", "prompt")[-len(embeds) :]
        return [
            f"the {name} was cut at 77 tokens, without: {each.truncated}"
            for name, each in zip(names, embeds, strict=True)
            if each.truncated
        ]


@dataclass(eq=False)
class JobImage:
    """One image of a job; its sample exists from its first step on."""

    job: Job
    index: int
    sample: Sample | None = None
