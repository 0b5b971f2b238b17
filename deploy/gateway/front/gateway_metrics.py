"""A gateway's own numbers for Prometheus; its engines tell theirs elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deploy.gateway.life.predictions import Predictions
from deploy.gateway.work import Engines

# By the values of the labels.
Counts = Mapping[Any, int]


class GatewayMetrics:
    """What a scrape is told: everything, as it is now. Asked on the event loop's thread alone."""

    def __init__(self, readings: Collector) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        for collector in (readings, ProcessCollector(registry=None)):
            self._registry.register(collector)

    def text(self) -> bytes:
        """In Prometheus's text format, version 1.0.0."""
        return generate_latest(self._registry)


class Readings(Collector):
    """A gateway's numbers.

    Args:
        webhooks: how many messages, by event and by what became of them.
    """

    def __init__(
        self, predictions: Predictions, engines: Engines, max_queued: int, webhooks: Counts
    ) -> None:
        self._predictions, self._engines = predictions, engines
        self._max_queued, self._webhooks = max_queued, webhooks

    def collect(self) -> Iterator[Metric]:
        """Each metric."""
        for name, said, value in self._gauges():
            yield GaugeMetricFamily(f"dmd2_gateway_{name}", said, value)
        attempts = {(why,): count for why, count in self._predictions.attempts.items()}
        yield _counter("attempts", "Times that engines were given work.", ["why"], attempts)
        said = "Predictions that came to their end."
        yield _counter("predictions", said, ["dialect", "status"], self._predictions.ended)
        said = "Messages to webhooks, by what became of them."
        yield _counter("webhooks", said, ["event", "outcome"], self._webhooks)

    def _gauges(self) -> Iterator[tuple[str, str, int]]:
        predictions, engines = self._predictions, self._engines
        yield "queue", "Predictions that wait for an engine.", predictions.num_queued
        yield "queue_limit", "The most that may wait beside those with engines.", self._max_queued
        yield "in_progress", "Predictions that are not over.", predictions.num_under_way
        yield "engines_ready", "Engines that take work.", engines.num_ready
        yield "capacity", "Predictions that they may have at a time.", engines.capacity


def _counter(name: str, said: str, labels: list[str], counts: Counts) -> CounterMetricFamily:
    counter = CounterMetricFamily(f"dmd2_gateway_{name}", said, labels=labels)
    for values, count in counts.items():
        counter.add_metric([*values], count)
    return counter
