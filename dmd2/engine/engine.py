"""The engine: accepts requests from anywhere, runs them on one GPU thread, saves beside it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dmd2.engine.batch_limits import BatchLimits, warm_up
from dmd2.engine.breakdown import end_process
from dmd2.engine.deadlines import Deadlines, within
from dmd2.engine.delivery import Delivery, Space
from dmd2.engine.job import GenerationResult, Job, JobImage
from dmd2.engine.progress import ProgressFile
from dmd2.engine.scheduling import FairScheduler, Work
from dmd2.engine.tally import EngineTally
from dmd2.engine.units import KINDS, Finish, Kind
from dmd2.errors import DeviceMemoryError, DMD2Error, GenerationError
from dmd2.fast.tuning import Tuning
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.settings import SafetyMode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _InFlight:
    """Work that was given to the device: what to do for each image once it is done."""

    kind: Kind
    images: list[JobImage]
    finish: Finish
    began: float


class Engine:
    """Runs requests on a pipeline, their images in shared batches, on one thread of its own.

    Args:
        pipeline: the models; from here on only the engine's thread touches them.
        output_dir: each request gets a new folder in here for its files.
        limits: how many images share a unit of work.
        safety: what becomes of an image that the pipeline's safety checker flags: "withhold",
            "blur", or "flag" (return it, and say so).
        deadlines: of every request; none by default.
        kinds: of work, in the order of an image's way.
        space: what bounds the bytes that all files take; None for no bound.
        progress: is told of each unit of work that was done.

    Attributes:
        tally: what it has to do and has done, in numbers.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        output_dir: Path,
        limits: BatchLimits | None = None,
        safety: SafetyMode = "withhold",
        deadlines: Deadlines | None = None,
        kinds: Sequence[Kind] = KINDS,
        space: Space | None = None,
        progress: ProgressFile | None = None,
    ) -> None:
        self.card = pipeline.card
        self.lora_names = pipeline.weight_sets.names
        self._pipeline = pipeline
        self._delivery = Delivery(output_dir, safety, space)
        self._deadlines = deadlines or Deadlines()
        self.tally = EngineTally([str(kind) for kind in kinds], pipeline.device)
        self._arrivals: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._limits = limits or BatchLimits()
        self._kinds = kinds
        self._progress = progress
        self._schedule: FairScheduler[JobImage, Kind] = FairScheduler(
            kinds,
            lambda lane, kind: self._limits(lane, kind),
            lambda image: image.job.over,
            lambda work: work.kind.ready_cost(pipeline, work.images),
        )
        self._in_flight: deque[_InFlight] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="dmd2-gpu", daemon=True)
        self._thread.start()

    def warm_up(self, max_batch: int | None = None, tuning: Tuning | None = None) -> None:
        """Run the models for a first time, and choose ways; for a new engine, before any request.

        The engine's thread does it. Threads that run torch's CPU kernels have teams of workers
        of their own, and idle teams slow the others down: warmed up elsewhere, one image took 2.5
        times as long ever after.

        Args:
            max_batch: how many images may share a step; None measures how many pay.
            tuning: which faster ways to call the models are tried; None for the usual.
        """
        found: Future[BatchLimits] = Future()

        def run() -> None:
            try:
                limits = warm_up(self._pipeline, max_batch, tuning)
                self.tally.look_at_memory()
                found.set_result(limits)
            except Exception as error:  # setup's, which waits for it
                found.set_exception(error)

        self._arrivals.put(run)
        self._limits = found.result()

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Run a request; if the caller is cancelled, it stops before its next step.

        Raises:
            InvalidRequestError: its files could be more than all outputs may be.
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
            self.tally.left_queue(job.name)
            self._delivery.over(job)

    def submit(self, request: GenerationRequest) -> Future[GenerationResult]:
        """Run a request; the future cannot be cancelled (generate can)."""
        return self._submit(request).future

    def problem(self) -> str | None:
        """Why the engine serves nobody, or None. Cheap, and from any thread."""
        if not self._thread.is_alive():
            return "the GPU thread has ended"
        if self.tally.unit_age_s() > self._deadlines.run_s:
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
        self._delivery.check(request)
        job = Job(request)
        self.tally.queued(job)
        self._arrivals.put(partial(self._enqueue, job))
        return job

    def _serve(self) -> None:
        """The GPU thread: admit what has come, give the device its next work, and again.

        A device that works on its own is given one unit ahead, and no more: what comes in waits
        for the unit in progress and the one behind it at most.
        """
        while self._admit():
            self.tally.unit_begins()
            if (work := self._schedule.next_work()) is not None:
                self._begin(work)
            ahead = self._pipeline.units_ahead if self._schedule else 0
            while len(self._in_flight) > ahead:
                self._finish(self._in_flight.popleft())
            self.tally.unit_ends()
            self.tally.look_at_memory()
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
        for index in range(job.request.num_outputs):
            self._queue(JobImage(job, index))

    def _queue(self, image: JobImage) -> None:
        """Have an image wait for the next kind of work that it needs, if there is one."""
        try:
            kind = next((kind for kind in self._kinds if kind.is_needed_by(image)), None)
        except Exception as error:  # of the kind's own making, which ends this image's request
            self._drop(image, error)
            return
        if kind is None:
            self._schedule.remove(image.job.lane, image)
        else:
            self._schedule.put(image.job.lane, image, kind)

    def _begin(self, work: Work[JobImage, Kind]) -> None:
        """Give the device one unit of work, without those whom nobody waits for any more.

        What fails for several images is tried again for each alone, so that only the request
        that is to blame fails, and what needs too much memory together may fit one by one.
        """
        wanted = [image for image in work.images if not image.job.over]
        for image in set(work.images) - set(wanted):
            self._schedule.remove(work.lane, image)
        if not wanted:
            return
        for job in {image.job for image in wanted if not image.job.started.done()}:
            job.ended("queue")
        began = time.perf_counter()
        try:
            finish = work.kind.run(self._pipeline, wanted)
        except Exception as error:  # whatever a kernel throws ends these requests, not the thread
            self._end_if_broken(error)
            if len(wanted) == 1:
                self._drop(wanted[0], error)
                return
            log.warning("a %s of %d images failed (%s): one by one", work.kind, len(wanted), error)
            if isinstance(error, DeviceMemoryError):
                self._limits.lower(work.lane, work.kind, len(wanted))
            for image in wanted:
                self._begin(Work(work.kind, work.lane, [image]))
            return
        self._in_flight.append(_InFlight(work.kind, wanted, finish, began))
        for image in wanted:
            self._queue(image)

    def _finish(self, unit: _InFlight) -> None:
        """Wait for a unit of work, and deliver what has left the device."""
        for image in unit.images:
            try:
                finished = unit.finish(image)
                if finished is not None:
                    self._delivery.take(image, finished)
            except Exception as error:  # CUDA may say only now what went wrong
                self._end_if_broken(error)
                self._drop(image, error)
        self.tally.unit_done(str(unit.kind), len(unit.images))
        if self._progress is not None:
            seconds = time.perf_counter() - unit.began
            self._progress.note(str(unit.kind), unit.images, seconds)

    def _end_if_broken(self, error: Exception) -> None:
        """End the process where the device is beyond repair."""
        if not isinstance(error, DMD2Error) and self._pipeline.is_broken():
            end_process("the device is beyond repair", error)

    def _drop(self, image: JobImage, error: Exception) -> None:
        image.job.fail(error)
        self._schedule.remove(image.job.lane, image)

    def _fail_the_rest(self) -> None:
        error = GenerationError("the engine was closed before this request was finished")
        while not self._arrivals.empty():
            arrival = self._arrivals.get()
            if arrival is not None:
                arrival()
        while (work := self._schedule.next_work()) is not None:
            for image in work.images:
                self._drop(image, error)
        for unit in self._in_flight:
            for image in unit.images:
                self._drop(image, error)
