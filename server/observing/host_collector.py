"""The use of the host's CPU and memory as metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from convoynet.server.host import cpu_seconds, memory_bytes


class HostCollector:
    """Reads them when it is scraped (prometheus_client's collector protocol)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The families of now."""
        busy, total = cpu_seconds()
        seconds = CounterMetricFamily("convoy_host_cpu_seconds_total", "CPU time of the host", labels=["mode"])
        seconds.add_metric(["busy"], busy)
        seconds.add_metric(["idle"], total - busy)
        yield seconds
        memory = GaugeMetricFamily("convoy_host_memory_bytes", "Memory of the host", labels=["kind"])
        for kind, value in zip(("total", "available"), memory_bytes(), strict=True):
            memory.add_metric([kind], value)
        yield memory
