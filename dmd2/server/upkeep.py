"""What a process that serves needs beside its engine: room for files, and numbers for a scraper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmd2 import __version__
from dmd2.server import health
from dmd2.server.janitor import ALL_NAMES, OUTPUT_NAMES, Janitor
from dmd2.server.output_space import OutputSpace
from dmd2.server.request_tally import RequestTally
from dmd2.settings import Settings

if TYPE_CHECKING:  # prometheus_client is imported only where metrics are asked for
    from dmd2.server.metrics import EngineNumbers, MetricsPort


class Upkeep:
    """A serving process's upkeep, which begins once there is an engine.

    Args:
        settings: of the process.
        stages: of a request.
        foreign: folders of others whose bytes count too, and which are swept whole.

    Attributes:
        space: what bounds the bytes that outputs take.
        tally: of the process's requests.

    Raises:
        DMD2Error: the metrics' port cannot be bound.
    """

    def __init__(
        self, settings: Settings, stages: Sequence[str], foreign: Sequence[Path] = ()
    ) -> None:
        self._settings, self._foreign = settings, foreign
        self._metrics_port = _bound_port(settings)
        self._janitor: Janitor | None = None
        self.space = OutputSpace(
            settings.output_dir,
            settings.max_output_bytes or health.space_for_outputs(settings.output_dir),
            foreign,
            in_flight_s=settings.queue_timeout_s + settings.run_timeout_s,
        )
        self.tally = RequestTally(stages)

    def begin(self, model: str, engine: EngineNumbers) -> None:
        """Sweep old outputs and answer scrapes from now on.

        Args:
            model: the name of what is served.
            engine: what it has to do and has done.
        """
        settings = self._settings
        foreign = ((folder, ALL_NAMES) for folder in self._foreign)
        own = (settings.output_dir, OUTPUT_NAMES)
        self._janitor = Janitor([own, *foreign], settings.keep_outputs_s)
        if self._metrics_port is not None:
            facts = {"model": model, "version": __version__}
            self._metrics_port.serve(facts, self.tally, engine, self.space)

    def problem(self) -> str | None:
        """Why the disk takes no more images, or None."""
        return health.disk_problem(self._settings.output_dir)

    def close(self) -> None:
        """End the threads that `begin` has started."""
        if self._janitor is not None:
            self._janitor.close()
        if self._metrics_port is not None:
            self._metrics_port.close()


def _bound_port(settings: Settings) -> MetricsPort | None:
    """The port for metrics, before a model is loaded for nothing where another process has it."""
    if settings.metrics_port is None:
        return None
    from dmd2.server.metrics import MetricsPort

    return MetricsPort(settings.metrics_host, settings.metrics_port)
