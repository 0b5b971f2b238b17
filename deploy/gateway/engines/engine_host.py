"""The engine of a process, as a gateway asks for it: work in, files' bytes out."""

from __future__ import annotations

import asyncio
import base64
import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deploy.gateway.engines.vigil import Vigil
from deploy.gateway.work import Outcome, Work
from dmd2.engine import report
from dmd2.engine.job import STAGES, GenerationResult
from dmd2.engine.service import Service
from dmd2.errors import DeadlineError
from dmd2.server import logs
from dmd2.server.upkeep import Upkeep
from dmd2.settings import Settings

log = logging.getLogger(__name__)

_HANDOVER_THREADS = 2
_MEDIA_TYPES = {".png": b"image/png", ".jpg": b"image/jpeg", ".webp": b"image/webp"}


class EngineHost:
    """An engine, its LoRAs and its upkeep. Making one loads the model; one event loop uses it.

    Several of one machine may share the settings' output_dir, where files lie until they are read
    back. A metrics_port they cannot share. An engine that will never serve again ends the process.

    Args:
        settings: of the process.

    Attributes:
        card: of the model.

    Raises:
        DMD2Error: the engine cannot be opened, or the metrics' port.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._upkeep = Upkeep(settings, STAGES)
        self._service = Service(settings, self._upkeep.space)
        self.card = self._service.card
        self._upkeep.begin(self.card.name, self._service.engine.tally)
        self._handover = ThreadPoolExecutor(_HANDOVER_THREADS, "dmd2-handover")
        self._vigil = Vigil(self._service.engine)

    async def run(self, work: Work) -> Outcome:
        """Do it, and read its files back, which are deleted then; whoever cancels this ends it.

        Whatever goes wrong is an outcome too: the error's name and text. Nothing comes of what an
        engine holds whose device has hung: the process ends.
        """
        telling = _Telling()
        try:
            with logs.naming(work.id):
                return telling.outcome(await self._outputs(work, telling))
        except Exception as error:  # which was logged, and is this work's alone
            return telling.outcome(error=f"{type(error).__name__}: {error}")

    def problem(self) -> str | None:
        """Why the disk takes no images for now, or None. Cheap, and from any thread."""
        return self._upkeep.problem()

    def close(self) -> None:
        """Stop after the step in progress; what is unfinished fails."""
        self._vigil.close()
        self._upkeep.close()
        self._handover.shutdown()

    async def _outputs(self, work: Work, telling: _Telling) -> tuple[bytes, ...]:
        request, tally = work.request, self._upkeep.tally
        with tally.request(request.num_outputs), report.reporting_failures(log):
            telling.add(report.of_start(request, work.loras))
            result = await self._result(work)
            num_withheld = len(result.withheld)
            tally.made(result.seconds, request.num_outputs, len(result.flagged), num_withheld)
            telling.add(report.of_end(result))
            loop = asyncio.get_running_loop()
            outputs = await loop.run_in_executor(self._handover, _handed_over, result.paths)
        log.info("%s", report.summary_of(result, self._settings.log_prompts))
        return outputs

    async def _result(self, work: Work) -> GenerationResult:
        try:
            return await self._service.generate(work.request, work.loras)
        except DeadlineError:
            # A deadline is the request's own end only where the device still ends its units.
            await self._vigil.unit_ended()
            raise


class _Telling:
    """What has been told of some work so far."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._lines: list[str] = []
        self._metrics: dict[str, Any] = {}

    def add(self, told: report.Report) -> None:
        """Tell more."""
        self._lines += told.lines
        self._metrics |= told.metrics

    def outcome(self, outputs: tuple[bytes, ...] = (), error: str | None = None) -> Outcome:
        """All of it, at the end; predict_time is what the whole took, as Cog's server calls it."""
        metrics = {**self._metrics, "predict_time": time.perf_counter() - self._began}
        return Outcome(outputs, error, "".join(f"{line}\n" for line in self._lines), metrics)


def _handed_over(paths: Sequence[Path]) -> tuple[bytes, ...]:
    """The files of a request as `data:` URLs; the folder that holds them alone is deleted."""
    try:
        return tuple(map(_data_url, paths))
    finally:
        shutil.rmtree(paths[0].parent, ignore_errors=True)


def _data_url(path: Path) -> bytes:
    media_type = _MEDIA_TYPES[path.suffix]
    return b"data:" + media_type + b";base64," + base64.b64encode(path.read_bytes())
