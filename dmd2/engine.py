"""The engine: accepts requests from anywhere, runs them on one GPU thread, saves beside it."""

from __future__ import annotations

import asyncio
import queue
import tempfile
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmd2 import image_io
from dmd2.errors import GenerationError
from dmd2.pipeline import Conditioning, Pipeline, Sample
from dmd2.request import GenerationRequest
from dmd2.scheduling import FirstComeFirstServed

STAGES = ("encode", "sample", "decode", "save")
_SAVE_THREADS = 4


@dataclass(frozen=True)
class GenerationResult:
    """A finished request.

    Attributes:
        request: what was made; its seeds and size are settled.
        paths: one complete file an image, in order, each with a name of its own.
        seconds: per stage of STAGES, the time it took for all images of the request.
        notes: for the logs, which words of a prompt the text encoders did not read.
    """

    request: GenerationRequest
    paths: list[Path]
    seconds: dict[str, float]
    notes: list[str]


@dataclass(eq=False)
class _Job:
    """A request on its way through the engine."""

    request: GenerationRequest
    future: Future[GenerationResult] = field(default_factory=Future)
    unwanted: threading.Event = field(default_factory=threading.Event)
    conditioning: Conditioning | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    folder: Path | None = None
    paths: dict[int, Path] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def over(self) -> bool:
        return self.unwanted.is_set() or self.future.done()

    def fail(self, error: BaseException) -> None:
        with self.lock:
            if not self.future.done():
                self.future.set_exception(error)


@dataclass(eq=False)
class _Image:
    """One image of a job; its sample exists from its first step on."""

    job: _Job
    index: int
    sample: Sample | None = None


class Engine:
    """Runs requests on a pipeline, in the order they come, on one thread of its own.

    Args:
        pipeline: the models; from here on only the engine's thread touches them.
        output_dir: each request gets a new folder in here for its files.
    """

    def __init__(self, pipeline: Pipeline, output_dir: Path) -> None:
        self.card = pipeline.card
        self._pipeline = pipeline
        self._output_dir = output_dir
        self._arrivals: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._schedule: FirstComeFirstServed[_Image] = FirstComeFirstServed()
        self._savers = ThreadPoolExecutor(_SAVE_THREADS, thread_name_prefix="dmd2-save")
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="dmd2-gpu", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Run a request; if the caller is cancelled, it stops before its next step.

        Raises:
            GenerationError: the request could not be finished, or the engine is closed.
        """
        job = self._submit(request)
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            job.unwanted.set()
            raise

    def submit(self, request: GenerationRequest) -> Future[GenerationResult]:
        """Run a request; the future cannot be cancelled (generate can)."""
        return self._submit(request).future

    def close(self) -> None:
        """Stop after the step in progress; what is unfinished fails with GenerationError."""
        self._closed = True
        self._arrivals.put(None)
        self._thread.join()
        self._savers.shutdown()

    def _submit(self, request: GenerationRequest) -> _Job:
        if self._closed:
            raise GenerationError("the engine is closed")
        job = _Job(request)
        job.future.set_running_or_notify_cancel()
        self._arrivals.put(job)
        return job

    def _serve(self) -> None:
        """The GPU thread: admit what has come, run one step of the next batch, and again."""
        while self._admit():
            if self._schedule:
                self._advance(self._schedule.next_batch())
        self._fail_the_rest()

    def _admit(self) -> bool:
        """Queue every arrival, waiting for one only when idle; False when closed."""
        while True:
            try:
                job = self._arrivals.get(block=not self._schedule)
            except queue.Empty:
                return True
            if job is None:
                return False
            self._schedule.add([_Image(job, index) for index in range(job.request.num_outputs)])

    def _advance(self, batch: list[_Image]) -> None:
        wanted = [image for image in batch if not image.job.over]
        for image in set(batch) - set(wanted):
            self._schedule.remove(image)
        try:
            self._step(wanted)
        except Exception as error:  # whatever a kernel throws ends these requests, not the thread
            for image in wanted:
                image.job.fail(error)
                self._schedule.remove(image)

    def _step(self, batch: list[_Image]) -> None:
        samples = [self._sample_of(image) for image in batch]
        if not samples:
            return
        started = time.perf_counter()
        self._pipeline.step(samples)
        finished = [i for i, s in zip(batch, samples, strict=True) if s.trajectory.done]
        if finished:
            self._pipeline.synchronize()
        for job in {image.job for image in batch}:
            job.seconds["sample"] += time.perf_counter() - started
        for image in finished:
            self._decode(image)

    def _sample_of(self, image: _Image) -> Sample:
        """The image's sample; its first use embeds the prompt and draws the noise."""
        job = image.job
        if job.conditioning is None:
            started = time.perf_counter()
            job.conditioning = self._pipeline.encode(job.request)
            self._pipeline.synchronize()
            job.seconds["encode"] += time.perf_counter() - started
        if image.sample is None:
            image.sample = self._pipeline.start(job.request, image.index, job.conditioning)
        return image.sample

    def _decode(self, image: _Image) -> None:
        assert image.sample is not None
        self._schedule.remove(image)
        if image.job.over:
            return
        started = time.perf_counter()
        pixels = self._pipeline.decode(image.sample)
        image.job.seconds["decode"] += time.perf_counter() - started
        self._savers.submit(self._save, image.job, image.index, pixels)

    def _save(self, job: _Job, index: int, pixels: NDArray[np.uint8]) -> None:
        """Write one image's file; the last one of a job settles its future."""
        try:
            started = time.perf_counter()
            data = image_io.encode(pixels, job.request, index)
            name = f"{uuid.uuid4().hex[:12]}-{index}.{job.request.output_format}"
            path = self._folder_of(job) / name
            image_io.write(path, data)
            with job.lock:
                job.paths[index] = path
                job.seconds["save"] += time.perf_counter() - started
            self._settle(job)
        except Exception as error:  # a full or read-only disk ends this request only
            failure = GenerationError(f"image {index} could not be saved: {error}")
            failure.__cause__ = error
            job.fail(failure)

    def _folder_of(self, job: _Job) -> Path:
        with job.lock:
            if job.folder is None:
                self._output_dir.mkdir(parents=True, exist_ok=True)
                job.folder = Path(tempfile.mkdtemp(dir=self._output_dir))
            return job.folder

    def _settle(self, job: _Job) -> None:
        with job.lock:
            if len(job.paths) < job.request.num_outputs or job.future.done():
                return
            assert job.conditioning is not None
            paths = [job.paths[index] for index in sorted(job.paths)]
            notes = _cut_words(job.conditioning)
            job.future.set_result(GenerationResult(job.request, paths, job.seconds, notes))

    def _fail_the_rest(self) -> None:
        error = GenerationError("the engine was closed before this request was finished")
        while self._schedule:
            for image in self._schedule.next_batch():
                image.job.fail(error)
                self._schedule.remove(image)
        while not self._arrivals.empty():
            job = self._arrivals.get()
            if job is not None:
                job.fail(error)


def _cut_words(conditioning: Conditioning) -> list[str]:
    names = ("negative prompt", "prompt")[-len(conditioning.embeds) :]
    return [
        f"the {name} was cut at 77 tokens, without: {embeds.truncated}"
        for name, embeds in zip(names, conditioning.embeds, strict=True)
        if embeds.truncated
    ]
