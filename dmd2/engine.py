"""The engine: accepts requests from anywhere, runs them on one GPU thread, saves beside it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmd2 import image_io
from dmd2.batch_limits import BatchLimits, warm_up
from dmd2.errors import DeviceMemoryError, GenerationError
from dmd2.job import GenerationResult, Job, JobImage
from dmd2.pipeline import Picture, Pipeline, Sample
from dmd2.request import GenerationRequest
from dmd2.scheduling import FairScheduler, Work

log = logging.getLogger(__name__)

_SAVE_THREADS = 4


@dataclass(frozen=True)
class _InFlight:
    """Work that was given to the device: what to do once it is done."""

    images: list[JobImage]
    finish: Callable[[], None]


class Engine:
    """Runs requests on a pipeline, their images in shared batches, on one thread of its own.

    Args:
        pipeline: the models; from here on only the engine's thread touches them.
        output_dir: each request gets a new folder in here for its files.
        limits: how many images share a unit of work.
    """

    def __init__(
        self, pipeline: Pipeline, output_dir: Path, limits: BatchLimits | None = None
    ) -> None:
        self.card = pipeline.card
        self._pipeline = pipeline
        self._output_dir = output_dir
        self._arrivals: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._limits = limits or BatchLimits()
        self._schedule: FairScheduler[JobImage] = FairScheduler(
            lambda lane, kind: self._limits(lane, kind)
        )
        self._in_flight: deque[_InFlight] = deque()
        self._savers = ThreadPoolExecutor(_SAVE_THREADS, thread_name_prefix="dmd2-save")
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="dmd2-gpu", daemon=True)
        self._thread.start()

    def warm_up(self, max_batch: int | None = None) -> None:
        """Run the models for a first time; for a new engine, before any request.

        The engine's thread does it. Threads that run torch's CPU kernels have teams of workers
        of their own, and idle teams slow the others down: warmed up elsewhere, one image took 2.5
        times as long ever after.

        Args:
            max_batch: how many images may share a step; None measures how many pay.
        """
        found: Future[BatchLimits] = Future()

        def run() -> None:
            try:
                found.set_result(warm_up(self._pipeline, max_batch))
            except Exception as error:  # setup's, which waits for it
                found.set_exception(error)

        self._arrivals.put(run)
        self._limits = found.result()

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
        """Stop after the work in progress; what is unfinished fails with GenerationError."""
        self._closed = True
        self._arrivals.put(None)
        self._thread.join()
        self._savers.shutdown()

    def _submit(self, request: GenerationRequest) -> Job:
        if self._closed:
            raise GenerationError("the engine is closed")
        job = Job(request)
        job.future.set_running_or_notify_cancel()
        self._arrivals.put(partial(self._enqueue, job))
        return job

    def _serve(self) -> None:
        """The GPU thread: admit what has come, give the device its next work, and again.

        A device that works on its own is given one unit ahead, and no more: what comes in waits
        for the unit in progress and the one behind it at most.
        """
        while self._admit():
            if self._schedule:
                self._begin(self._schedule.next_work())
            ahead = self._pipeline.units_ahead if self._schedule else 0
            while len(self._in_flight) > ahead:
                self._finish(self._in_flight.popleft())
        self._fail_the_rest()

    def _admit(self) -> bool:
        """Take every arrival, waiting for one only when idle; False when closed."""
        while True:
            try:
                arrival = self._arrivals.get(block=not self._schedule)
            except queue.Empty:
                return True
            if arrival is None:
                return False
            arrival()

    def _enqueue(self, job: Job) -> None:
        images = [JobImage(job, index) for index in range(job.request.num_outputs)]
        self._schedule.add(job.lane, images)

    def _begin(self, work: Work[JobImage]) -> None:
        """Give the device one unit of work, without those whom nobody waits for any more.

        What fails for several images is tried again for each alone, so that only the request
        that is to blame fails, and what needs too much memory together may fit one by one.
        """
        wanted = [image for image in work.images if not image.job.over]
        for image in set(work.images) - set(wanted):
            self._schedule.remove(work.lane, image)
        if not wanted:
            return
        try:
            finish = self._step(wanted) if work.kind == "step" else self._decode(wanted)
            self._in_flight.append(_InFlight(wanted, finish))
        except Exception as error:  # whatever a kernel throws ends these requests, not the thread
            if len(wanted) == 1:
                self._drop(wanted, error)
                return
            log.warning("a %s of %d images failed (%s): one by one", work.kind, len(wanted), error)
            if isinstance(error, DeviceMemoryError):
                self._limits.lower(work.lane, work.kind, len(wanted))
            for image in wanted:
                self._begin(Work(work.kind, work.lane, [image]))

    def _finish(self, unit: _InFlight) -> None:
        try:
            unit.finish()
        except Exception as error:  # CUDA may say only now what went wrong
            self._drop(unit.images, error)

    def _step(self, images: list[JobImage]) -> Callable[[], None]:
        samples = self._samples_of(images)
        self._pipeline.step(samples)
        wait = self._pipeline.mark()
        for job in {image.job for image in images}:
            job.batch_sizes.append(len(images))
        finished = [i for i, s in zip(images, samples, strict=True) if s.trajectory.done]
        for image in finished:
            self._schedule.sampled(image.job.lane, image)

        def finish() -> None:
            wait()
            for image in finished:
                image.job.ended("sample")

        return finish

    def _samples_of(self, images: list[JobImage]) -> list[Sample]:
        """The images' samples; their first use embeds the prompts and draws the noise."""
        new = list(dict.fromkeys(i.job for i in images if i.job.conditioning is None))
        for job in new:
            job.ended("queue")
        encoded = self._pipeline.encode([job.request for job in new])
        for job, conditioning in zip(new, encoded, strict=True):
            job.conditioning = conditioning
            job.ended("encode")
        for image in images:
            if image.sample is None:
                assert image.job.conditioning is not None
                image.sample = self._pipeline.start(
                    image.job.request, image.index, image.job.conditioning
                )
        return [image.sample for image in images if image.sample is not None]

    def _decode(self, images: list[JobImage]) -> Callable[[], None]:
        for image in images:
            self._schedule.remove(image.job.lane, image)
        samples = [image.sample for image in images if image.sample is not None]
        pictures = self._pipeline.decode(samples)

        def finish() -> None:
            for image, picture in zip(images, pictures, strict=True):
                self._hand_over(image, picture)

        return finish

    def _hand_over(self, image: JobImage, picture: Picture) -> None:
        """Give a picture to the threads that save."""
        try:
            pixels = picture.pixels()
        except Exception as error:  # of this image alone
            image.job.fail(error)
            return
        image.job.ended("decode")
        if not image.job.over:
            self._savers.submit(self._save, image.job, image.index, pixels)

    def _save(self, job: Job, index: int, pixels: NDArray[np.uint8]) -> None:
        """Write one image's file."""
        try:
            data = image_io.encode(pixels, job.request, index)
            folder = self._output_dir / job.name
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = folder / f"{uuid.uuid4().hex[:12]}-{index}.{job.request.output_format}"
            image_io.write(path, data)
            job.saved(index, path)
        except Exception as error:  # a full or read-only disk ends this request only
            failure = GenerationError(f"image {index} could not be saved: {error}")
            failure.__cause__ = error
            job.fail(failure)

    def _drop(self, images: list[JobImage], error: Exception) -> None:
        for image in images:
            image.job.fail(error)
            self._schedule.remove(image.job.lane, image)

    def _fail_the_rest(self) -> None:
        error = GenerationError("the engine was closed before this request was finished")
        while not self._arrivals.empty():
            arrival = self._arrivals.get()
            if arrival is not None:
                arrival()
        while self._schedule:
            self._drop(self._schedule.next_work().images, error)
        while self._in_flight:
            self._drop(self._in_flight.popleft().images, error)
