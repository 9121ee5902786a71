"""What Prometheus sees. The registry is the caller's; every name and unit is documented in docs/metrics.md."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, Gauge, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric

from convoynet.server.host import cpu_seconds, memory_bytes
from convoynet.server.observing.histogram import Counter, Histogram
from convoynet.server.observing.host_collector import HostCollector
from convoynet.server.observing.statistics import Statistics
from convoynet.server.types import Timings

SECONDS = (
    0.00025, 0.0004, 0.0007, 0.0012, 0.002, 0.0035, 0.006, 0.01, 0.017, 0.03,
    0.05, 0.085, 0.15, 0.25, 0.42, 0.72, 1.2, 2.1, 3.5, 6.0, 10.0,
)  # fmt: skip
"""Histogram buckets for ConvNets: 0.25 ms to 10 s in steps of about 1.7."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MODEL = ("model", "version")
NO_MODEL = ("", "")
"""What names count for that no model has: they share one series, so that clients cannot make new ones."""
STATES = ("loading", "ready", "failed", "draining")
_CODES = ("OK", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
_COUNTED = ("auth", "memory")
_REASONS = ("queue_full", "deadline")
"""Outcomes that alerts look at: their series begin at 0, since Prometheus sees no increase in a series' first value."""

_Series = TypeVar("_Series", Counter, Histogram, Gauge)


class Metrics:
    """Every series of one server, on the registry that is given."""

    def __init__(self, registry: CollectorRegistry, version: str) -> None:
        self.registry = registry

        def counter(name: str, text: str, labels: Iterable[str] = _MODEL) -> Counter:
            return self._of_models(Counter(name, text, labels, registry=registry))

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return self._of_models(Histogram(name, text, _MODEL, buckets=buckets, registry=registry))

        def gauge(name: str, text: str) -> Gauge:
            return self._of_models(Gauge(name, text, _MODEL, registry=registry))

        self._labelled: list[Counter | Histogram | Gauge] = []
        self.requests = counter("convoy_requests_total", "Inference requests by outcome", (*_MODEL, "protocol", "code"))
        self.rejected = counter(
            "convoy_rejected_total", "Requests refused or given up before their answer", (*_MODEL, "reason")
        )
        self.inferences = counter("convoy_inferences_total", "Rows that were inferred", _MODEL)
        self.executions = counter("convoy_executions_total", "Batches that an engine ran", _MODEL)
        self.request_duration = histogram("convoy_request_duration_seconds", "From the request's arrival to its answer")
        self.queue_duration = histogram("convoy_queue_duration_seconds", "A request's wait in the queue")
        self.decode_duration = histogram(
            "convoy_decode_duration_seconds", "Decoding and preparing the images of a request"
        )
        self.compute_duration = histogram(
            "convoy_compute_duration_seconds", "The run of the batch that a request was in"
        )
        self.batch_size = histogram("convoy_batch_size", "Rows in a batch that ran", ROWS)
        self.queue_depth = gauge("convoy_queue_depth", "Requests admitted and not yet running")
        self.inflight = gauge("convoy_inflight_requests", "Requests being worked on, queued ones included")
        self.model_state = self._of_models(
            Gauge("convoy_model_state", "1 for the state that the model is in", (*_MODEL, "state"), registry=registry)
        )
        self.load_duration = gauge("convoy_model_load_duration_seconds", "Loading and warming up the model")
        self.queue_bytes = gauge("convoy_queue_bytes", "Bytes of the tensors of requests admitted and not yet running")
        self.padding = counter("convoy_batch_padding_rows_total", "Rows added to fill batches up")
        self.cache_hits = counter("convoy_response_cache_hits_total", "Requests answered from the cache")
        self.cache_misses = counter("convoy_response_cache_misses_total", "Requests that the cache had no answer to")
        self.restarts = counter("convoy_engine_restarts_total", "Engine processes started anew after a crash")
        self.hangs = counter("convoy_engine_hangs_total", "Engine processes ended since they did not answer in time")
        self.inflight_rows = gauge("convoy_inflight_rows", "Rows of the requests admitted and not yet answered")
        self.engine_rows = gauge(
            "convoy_engine_rows", "Rows that the engines that are up run at once; 0 until the model is ready"
        )
        self.queue_limit = gauge("convoy_queue_limit", "Requests that may wait, those of all priorities together")
        self.objective = gauge("convoy_latency_objective_seconds", "Latency objective of the model; 0 without one")
        self.concurrency_limit = gauge(
            "convoy_concurrency_limit", "Requests let in at once, adapted; 0 without a limit"
        )
        self.known: set[tuple[str, str]] = set()
        """Names and versions that have series; NO_MODEL stands for all others, so that no call makes new ones."""
        self.serving: dict[tuple[str, str], ModelMetrics] = {}
        """Whose gauges the series of a version show."""
        self.failed: Callable[[], Iterable[tuple[str, str]]] = tuple
        """Names and versions that could not be loaded, version "" for all of a model."""
        registry.register(_Failures(self))
        self._add_process(version)

    def _of_models(self, series: _Series) -> _Series:
        """Notes what forget() takes a model's series from."""
        self._labelled.append(series)
        return series

    def _add_process(self, version: str) -> None:
        """What is of the server and its machine rather than of a model."""
        info = Gauge("convoy_build_info", "Always 1; the label tells the version", ("version",), registry=self.registry)
        info.labels(version).set(1)
        self.frontends = Gauge("convoy_frontends", "Processes that take calls", registry=self.registry)
        self.frontends.set(1)
        for collector in (ProcessCollector, PlatformCollector, GCCollector, HostCollector):
            collector(registry=self.registry)

    def forget(self, model: str, version: str = "") -> None:
        """Takes away every series of a version that was unloaded, or of the whole model."""
        labels = {"model": model, "version": version} if version else {"model": model}
        for series in self._labelled:
            series.remove_by_labels(labels)
        self.known -= {each for each in self.known if each[0] == model and version in ("", each[1])}


class _Failures:
    """A custom collector of what could not be loaded: a folder that cannot be read has no series of its own."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """The family of now (prometheus_client's collector protocol)."""
        family = GaugeMetricFamily(
            "convoy_model_load_failed", "1 for what could not be loaded; no version: all of it", labels=_MODEL
        )
        for name, version in self._metrics.failed():
            family.add_metric((name, version), 1)
        return [family]


def _none() -> float:
    return 0


@dataclass(frozen=True)
class Levels:
    """What the gauges of a model show when they are scraped; Metrics says what each is."""

    depth: Callable[[], float] = _none
    inflight: Callable[[], float] = _none
    inflight_rows: Callable[[], float] = _none
    engine_rows: Callable[[], float] = _none
    queue_bytes: Callable[[], float] = _none
    limit: Callable[[], float] = _none


class ModelMetrics:
    """The series of one version of one model, looked up once."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str], levels: Levels) -> None:
        """Args: the server's metrics, name and version, and what its gauges show."""
        self._metrics = metrics
        self._labels = labels
        metrics.known.add(labels)
        self._gauges = (
            (metrics.queue_depth, levels.depth),
            (metrics.inflight, levels.inflight),
            (metrics.inflight_rows, levels.inflight_rows),
            (metrics.engine_rows, levels.engine_rows),
            (metrics.queue_bytes, levels.queue_bytes),
            (metrics.concurrency_limit, levels.limit),
        )
        for code in _CODES:
            metrics.requests.labels(*labels, "grpc", code)
            metrics.requests.labels(*labels, "http", code)
        for reason in _REASONS:
            metrics.rejected.labels(*labels, reason)
        self._inferences = metrics.inferences.labels(*labels)
        self._executions = metrics.executions.labels(*labels)
        self._queue = metrics.queue_duration.labels(*labels)
        self._compute = metrics.compute_duration.labels(*labels)
        self._batch = metrics.batch_size.labels(*labels)
        self.decode = metrics.decode_duration.labels(*labels)
        self.padding = metrics.padding.labels(*labels)
        self.cache_hits = metrics.cache_hits.labels(*labels)
        self.cache_misses = metrics.cache_misses.labels(*labels)
        self.restarts = metrics.restarts.labels(*labels)
        self.hangs = metrics.hangs.labels(*labels)
        self.objective = metrics.objective.labels(*labels)
        self.queue_limit = metrics.queue_limit.labels(*labels)

    @property
    def labels(self) -> tuple[str, str]:
        """Name and version, while they have series: what ends after its model was unloaded must not make them anew."""
        return self._labels if self._labels in self._metrics.known else NO_MODEL

    def set_state(self, state: str) -> None:
        """Marks the model as loading, ready, failed or draining.

        While a version is replaced by itself two models have its series; the gauges are of the one that serves.
        """
        serving = self._metrics.serving.get(self._labels)
        if serving not in (None, self) and state != "ready":
            return
        if state in ("loading", "ready"):
            self._metrics.serving[self._labels] = self
        else:
            self._metrics.serving.pop(self._labels, None)
        for gauge, function in self._gauges:
            gauge.labels(*self._labels).set_function(function)
        for other in STATES:
            self._metrics.model_state.labels(*self._labels, other).set(other == state)

    def loaded(self, seconds: float) -> None:
        """The model took that long to load and warm up."""
        self._metrics.load_duration.labels(*self._labels).set(seconds)

    def batch(self, rows: int) -> None:
        """An engine ran a batch."""
        self._executions.inc()
        self._batch.observe(rows)

    def success(self, timings: Timings, rows: int) -> None:
        """A request has its answer."""
        if timings.hit:
            return
        self._inferences.inc(rows)
        self._queue.observe((timings.started - timings.queued) / 1e9)
        self._compute.observe((timings.infer_done - timings.started) / 1e9)

    def remove(self) -> None:
        """The version was unloaded: its series disappear, unless another model of the same version serves."""
        if self._metrics.serving.get(self._labels) in (None, self):
            self._metrics.forget(*self._labels)

    def over(
        self, statistics: Statistics, timings: Timings, rows: int, error: BaseException | None, *, late: bool
    ) -> None:
        """A request is over (types.Counting.count): counts it here and in the model's totals."""
        if error is None:
            statistics.add_success(timings, rows)
            self.success(timings, rows)
            return
        statistics.add_failure(timings, error)
        if reason := why_rejected(error, late=late):
            self.rejected(reason)

    def rejected(self, reason: str) -> None:
        """A request was refused or given up."""
        self._metrics.rejected.labels(*self.labels, reason).inc()


def why_rejected(error: BaseException | None, *, late: bool) -> str:
    """The `reason` of convoy_rejected_total; "" where it is none, or was counted where it arose: rights and room.

    Args:
        error: What a request ended with; None where nobody waited for its end.
        late: Whether a client that went away did so at its deadline.
    """
    if error is None or isinstance(error, asyncio.CancelledError):
        return "deadline" if late else "cancelled"
    reason: str | None = getattr(error, "rejected", None)
    return "" if reason is None or reason in _COUNTED else reason


class TritonAliases:
    """The same facts under Triton's names and units, for dashboards and autoscalers that know those.

    A custom collector: it reads the statistics when it is scraped.
    """

    def __init__(self, models: Callable[[], Iterable[tuple[str, str, Statistics, int]]]) -> None:
        self._models = models
        self._cpu = cpu_seconds()

    def collect(self) -> Iterable[Metric]:
        """The families of now (prometheus_client's collector protocol)."""
        families: dict[str, Metric] = {}

        def add(name: str, text: str, value: float, **labels: str) -> None:
            # Not a counter family: that would append `_total` to the name.
            family = families.setdefault(name, Metric(name, text, "unknown"))
            family.add_sample(name, {**of_model, **labels}, value)

        for name, version, totals, depth in self._models():
            of_model = {"model": name, "version": version}
            add("nv_inference_request_success", "Successful requests", totals.success.count)
            for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER"):
                count = totals.failures.get(reason, 0)
                add("nv_inference_request_failure", "Failed requests", count, reason=reason)
            add("nv_inference_count", "Rows inferred", totals.inferences)
            add("nv_inference_exec_count", "Batches run", totals.executions)
            add("nv_inference_pending_request_count", "Requests that wait", depth)
            add("nv_cache_num_hits_per_model", "Requests answered from the response cache", totals.cache_hit.count)
            add("nv_cache_num_misses_per_model", "Requests that it had no answer to", totals.cache_miss.count)
            add("nv_cache_hit_duration_per_model", "Microseconds of finding answers in it", totals.cache_hit.ns // 1000)
            add("nv_cache_miss_duration_per_model", "Microseconds of asking it in vain", totals.cache_miss.ns // 1000)
            for stage, part in (
                ("request", totals.success),
                ("queue", totals.queue),
                ("compute_input", totals.input),
                ("compute_infer", totals.infer),
                ("compute_output", totals.output),
            ):
                add(f"nv_inference_{stage}_duration_us", f"Microseconds of {stage}", part.ns // 1000)
        yield from families.values()
        yield from self._host()

    def _host(self) -> Iterable[Metric]:
        """Of the whole machine, as Triton's: the CPU's utilization since the scrape before, 0 to 1."""
        earlier, self._cpu = self._cpu, cpu_seconds()
        busy, passed = (now - then for now, then in zip(self._cpu, earlier, strict=True))
        memory, free = memory_bytes()
        for name, text, value in (
            ("nv_cpu_utilization", "CPU utilization of the host, 0 to 1", busy / passed if passed else 0.0),
            ("nv_cpu_memory_total_bytes", "Memory of the host", memory),
            ("nv_cpu_memory_used_bytes", "Memory of the host that is used", memory - free),
        ):
            family = Metric(name, text, "gauge")
            family.add_sample(name, {}, value)
            yield family
