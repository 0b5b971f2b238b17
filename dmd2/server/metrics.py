"""Metrics for Prometheus on a port of their own; imported only where that is asked for.

Whoever scrapes is told numbers that other threads write, and takes no lock that they wait for. A
scrape ends after a few seconds, whatever its client does, and few run at once.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from dmd2.errors import DMD2Error
from dmd2.server.output_space import OutputSpace
from dmd2.server.request_tally import SECONDS, Durations, RequestTally

log = logging.getLogger(__name__)

_IMAGES = (1, 2, 4, 8, 16, 32, 64)
_MAX_SCRAPES = 8
_SCRAPE_S = 10.0
_LOOK_S = 0.5


class EngineNumbers(Protocol):
    """What the engine has to do and has done; waits for nobody."""

    def images_queued(self) -> int:
        """Images of requests that wait for the first step of one of theirs."""

    def unit_age_s(self) -> float:
        """How long the device has been at its unit of work; 0 where it has none."""

    def images_of_units(self) -> Mapping[str, Mapping[int, int]]:
        """For each kind, how many units of work were done for how many images."""

    def memory(self) -> tuple[int, int] | None:
        """Bytes that torch holds of the device's memory, and all that it has."""


class _Readings(Collector):
    """What a scrape is told: everything, as it is now."""

    def __init__(
        self,
        facts: Mapping[str, str],
        requests: RequestTally,
        engine: EngineNumbers,
        space: OutputSpace,
    ) -> None:
        self._facts, self._requests, self._engine, self._space = facts, requests, engine, space

    def collect(self) -> Iterator[Metric]:
        """Each metric; a name's end is its unit."""
        yield InfoMetricFamily("dmd2", "What is served, and by what.", dict(self._facts))
        yield from self._of_requests(self._requests)
        yield from self._of_the_engine(self._engine)
        yield GaugeMetricFamily(
            "dmd2_output_bytes", "Outputs held, as of the last one.", self._space.held_bytes()
        )
        yield GaugeMetricFamily(
            "dmd2_output_limit_bytes", "The most that they may take.", self._space.max_bytes
        )

    def _of_requests(self, requests: RequestTally) -> Iterator[Metric]:
        by_status = CounterMetricFamily(
            "dmd2_requests", "Requests that are over, by what became of them.", labels=["status"]
        )
        for status, count in requests.by_status.items():
            by_status.add_metric([status], count)
        yield by_status
        yield GaugeMetricFamily(
            "dmd2_requests_in_progress", "Requests that are not over.", requests.in_progress
        )
        durations = HistogramMetricFamily(
            "dmd2_request_duration_seconds", "From arrival to files, of requests that succeeded."
        )
        _add_durations(durations, [], requests.durations)
        yield durations
        stages = HistogramMetricFamily(
            "dmd2_stage_duration_seconds", "The parts of those durations.", labels=["stage"]
        )
        for stage, parts in requests.stages.items():
            _add_durations(stages, [stage], parts)
        yield stages
        yield CounterMetricFamily("dmd2_images", "Images that were made.", requests.images)
        yield CounterMetricFamily(
            "dmd2_images_flagged", "Those that the safety checker flagged.", requests.flagged
        )
        yield CounterMetricFamily(
            "dmd2_images_withheld", "Those that it kept from leaving.", requests.withheld
        )

    def _of_the_engine(self, engine: EngineNumbers) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "dmd2_images_queued",
            "Images of requests of which none has had its first step.",
            engine.images_queued(),
        )
        units = HistogramMetricFamily(
            "dmd2_unit_images", "Images that shared a unit of work of the device.", labels=["kind"]
        )
        for kind, counts in engine.images_of_units().items():
            up_to = [sum(n for images, n in counts.items() if images <= most) for most in _IMAGES]
            total = sum(images * count for images, count in counts.items())
            units.add_metric([kind], _buckets(_IMAGES, [*up_to, sum(counts.values())]), total)
        yield units
        yield GaugeMetricFamily(
            "dmd2_unit_age_seconds", "Of the unit of work in progress.", engine.unit_age_s()
        )
        if (memory := engine.memory()) is not None:
            reserved, total = memory
            yield GaugeMetricFamily(
                "dmd2_gpu_memory_reserved_bytes", "GPU memory that torch holds.", reserved
            )
            yield GaugeMetricFamily(
                "dmd2_gpu_memory_total_bytes", "GPU memory that there is.", total
            )


def _add_durations(to: HistogramMetricFamily, labels: list[str], durations: Durations) -> None:
    to.add_metric(labels, _buckets(SECONDS, list(accumulate(durations.counts))), durations.sum_s)


def _buckets(bounds: Sequence[float], up_to: Sequence[int]) -> list[tuple[str, float]]:
    """A histogram's, of how many are at most each bound, and at the end of all."""
    return list(zip([*map(str, map(float, bounds)), "+Inf"], up_to, strict=True))


class MetricsPort(ThreadingMixIn, TCPServer):
    """A port on which scrapes are answered, once there is something to tell.

    Bound when made, so that a server whose port is taken need not load its model to tell; until
    `serve` connections are refused.

    Args:
        host: DMD2_METRICS_HOST.
        port: DMD2_METRICS_PORT.

    Raises:
        DMD2Error: it cannot be bound.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._registry = CollectorRegistry(auto_describe=True)
        self._deadlines: dict[Any, float] = {}
        handler = MetricsHandler.factory(self._registry)
        self._host, self._port = host, port
        super().__init__((host, port), handler, bind_and_activate=False)
        with self._telling():
            self.server_bind()

    def serve(
        self,
        facts: Mapping[str, str],
        requests: RequestTally,
        engine: EngineNumbers,
        space: OutputSpace,
    ) -> None:
        """Answer scrapes from now on, on threads of its own.

        Args:
            facts: that stay, such as the model's name.
            requests: what became of them.
            engine: what it has to do and has done.
            space: what bounds outputs.

        Raises:
            DMD2Error: another process has taken the port since.
        """
        readings = _Readings(facts, requests, engine, space)
        for collector in (readings, ProcessCollector(registry=None)):
            self._registry.register(collector)
        with self._telling():
            self.server_activate()
        threading.Thread(
            target=self.serve_forever, args=(_LOOK_S,), name="dmd2-metrics", daemon=True
        ).start()
        log.info("metrics are on port %d of %s", self._port, self._host)

    def close(self) -> None:
        """Answer no more."""
        self.shutdown()
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for another scrape."""
        return len(self._deadlines) < _MAX_SCRAPES

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a scrape on a thread of its own."""
        self._deadlines[request] = time.monotonic() + _SCRAPE_S
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Break off the scrapes that take too long: their threads find their connections ended."""
        for request, deadline in list(self._deadlines.items()):
            if time.monotonic() > deadline:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        """A scrape is over."""
        super().shutdown_request(request)
        self._deadlines.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong on this side alone."""
        if not isinstance(sys.exception(), ConnectionError):
            log.exception("a scrape failed")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Say of an address that cannot be had which settings named it."""
        try:
            yield
        except OSError as error:
            self.socket.close()
            raise DMD2Error(
                f"DMD2_METRICS_PORT={self._port} of DMD2_METRICS_HOST={self._host} cannot be "
                f"opened: {error.strerror}. Choose another, or leave DMD2_METRICS_PORT out"
            ) from error
