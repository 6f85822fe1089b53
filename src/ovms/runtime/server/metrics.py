"""Figures for Prometheus: of the server, and of the instances when they are asked for."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ovms import __version__
from ovms.runtime.instances import Status
from ovms.spec.states import State

#: Seconds: a status is answered in one or two ms; a snapshot takes its time.
_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)


class Metrics:
    """All figures of one server. Labels have few values: no instance, no artifact, nothing of a caller's."""

    def __init__(self, statuses: Callable[[], list[Status]], connections: Callable[[], int]) -> None:
        """*statuses* of all instances, and the number of open *connections*, when they are asked for."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "ovms_requests", "Requests that were answered", ("call", "status"), registry=self._registry
        )
        self.seconds = Histogram(
            "ovms_request_seconds", "Until the answer began", ("call",), buckets=_BUCKETS, registry=self._registry
        )
        self._registry.register(_Now(statuses, connections))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def text(self) -> bytes:
        """In the text format, version 0.0.4."""
        return generate_latest(self._registry)


class _Now(Collector):
    def __init__(self, statuses: Callable[[], list[Status]], connections: Callable[[], int]) -> None:
        self._statuses = statuses
        self._connections = connections

    def collect(self) -> Iterator[GaugeMetricFamily]:
        count = Count(status.state for status in self._statuses())
        states = GaugeMetricFamily("ovms_instances", "Instances", labels=("state",))
        for state in State:
            states.add_metric((str(state),), count[state])
        yield states
        yield GaugeMetricFamily("ovms_connections", "Open connections", value=self._connections())
        version = GaugeMetricFamily("ovms_version", "The server's version", labels=("version",))
        version.add_metric((__version__,), 1)
        yield version

    def describe(self) -> list[GaugeMetricFamily]:
        return []
