"""The engine: accepts requests from anywhere, runs them on one GPU thread, saves beside it."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dmd2.engine.batch_limits import BatchLimits, warm_up
from dmd2.engine.deadlines import Deadlines, within
from dmd2.engine.delivery import Delivery
from dmd2.engine.job import GenerationResult, Job, JobImage
from dmd2.engine.scheduling import FairScheduler, Work
from dmd2.errors import DeviceMemoryError, DMD2Error, GenerationError
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.picture import Picture
from dmd2.sampling.pipeline import Pipeline, Sample
from dmd2.settings import SafetyMode

log = logging.getLogger(__name__)

# sysexits' EX_SOFTWARE: nothing that a caller did.
_EXIT_BROKEN = 70


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
        safety: what becomes of an image that the pipeline's safety checker flags: "withhold",
            "blur", or "flag" (return it, and say so).
        deadlines: of every request; none by default.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        output_dir: Path,
        limits: BatchLimits | None = None,
        safety: SafetyMode = "withhold",
        deadlines: Deadlines | None = None,
    ) -> None:
        self.card = pipeline.card
        self._pipeline = pipeline
        self._delivery = Delivery(output_dir, safety)
        self._deadlines = deadlines or Deadlines()
        self._unit_began: float | None = None
        self._arrivals: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._limits = limits or BatchLimits()
        self._schedule: FairScheduler[JobImage] = FairScheduler(
            lambda lane, kind: self._limits(lane, kind)
        )
        self._in_flight: deque[_InFlight] = deque()
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
            DeadlineError: it waited or ran for too long, and stops likewise.
            UnsafeContentError: every image was withheld.
        """
        job, limits = self._submit(request), self._deadlines
        try:
            await within(limits.queue_s, job.started, "waited", "DMD2_QUEUE_TIMEOUT_S")
            return await within(limits.run_s, job.future, "ran", "DMD2_RUN_TIMEOUT_S")
        finally:
            job.unwanted.set()  # by now nobody waits for it, however it ended

    def submit(self, request: GenerationRequest) -> Future[GenerationResult]:
        """Run a request; the future cannot be cancelled (generate can)."""
        return self._submit(request).future

    def problem(self) -> str | None:
        """Why the engine serves nobody, or None. Cheap, and from any thread."""
        if not self._thread.is_alive():
            return "the GPU thread has ended"
        began = self._unit_began
        if began is not None and time.monotonic() - began > self._deadlines.run_s:
            return f"the GPU thread has been in one unit of work for {self._deadlines.run_s:g} s"
        return None

    def close(self) -> None:
        """Stop after the work in progress; what is unfinished fails with GenerationError."""
        self._closed = True
        self._arrivals.put(None)
        self._thread.join()
        self._delivery.close()

    def _submit(self, request: GenerationRequest) -> Job:
        if self._closed:
            raise GenerationError("the engine is closed")
        job = Job(request)
        self._arrivals.put(partial(self._enqueue, job))
        return job

    def _serve(self) -> None:
        """The GPU thread: admit what has come, give the device its next work, and again.

        A device that works on its own is given one unit ahead, and no more: what comes in waits
        for the unit in progress and the one behind it at most.
        """
        while self._admit():
            self._unit_began = time.monotonic()
            if self._schedule:
                self._begin(self._schedule.next_work())
            ahead = self._pipeline.units_ahead if self._schedule else 0
            while len(self._in_flight) > ahead:
                self._finish(self._in_flight.popleft())
            self._unit_began = None
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
            self._end_if_broken(error)
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
            self._end_if_broken(error)
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
        """Wait for a picture and deliver it."""
        job = image.job
        try:
            job.ended("decode", at=picture.decoded())
            pixels, score = picture.result()
        except Exception as error:  # of this image alone
            self._end_if_broken(error)
            job.fail(error)
            return
        job.ended("check")
        self._delivery.take(image, pixels, score, picture.checked)

    def _end_if_broken(self, error: Exception) -> None:
        """End the process where the device is beyond repair: a new one gets a new context."""
        if not isinstance(error, DMD2Error) and self._pipeline.is_broken():
            log.critical("the device is beyond repair, so this process ends", exc_info=error)
            logging.shutdown()
            os._exit(_EXIT_BROKEN)

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
