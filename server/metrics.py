"""What Prometheus sees. The registry is the caller's; every name and unit is documented in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import Metric

from server.histogram import Counter, Histogram
from server.statistics import Statistics
from server.types import Timings

SECONDS = (
    0.00025, 0.0004, 0.0007, 0.0012, 0.002, 0.0035, 0.006, 0.01, 0.017, 0.03,
    0.05, 0.085, 0.15, 0.25, 0.42, 0.72, 1.2, 2.1, 3.5, 6.0, 10.0,
)  # fmt: skip
"""Histogram buckets for ConvNets: 0.25 ms to 10 s in steps of about 1.7."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MODEL = ("model", "version")
STATES = ("loading", "ready", "failed", "draining")


class Metrics:
    """Every series of one server, on the registry that is given."""

    def __init__(self, registry: CollectorRegistry, version: str) -> None:
        self.registry = registry

        def counter(name: str, text: str, labels: Iterable[str]) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, text, _MODEL, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, labels: Iterable[str] = _MODEL) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

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
        self.model_state = gauge("convoy_model_state", "1 for the state that the model is in", (*_MODEL, "state"))
        self.load_duration = gauge("convoy_model_load_duration_seconds", "Loading and warming up the model")
        gauge("convoy_build_info", "Always 1; the labels tell the version", ("version",)).labels(version).set(1)


class ModelMetrics:
    """The series of one version of one model, looked up once."""

    def __init__(
        self, metrics: Metrics, labels: tuple[str, str], depth: Callable[[], int], inflight: Callable[[], int]
    ) -> None:
        self._metrics = metrics
        self._labels = labels
        self._inferences = metrics.inferences.labels(*labels)
        self._executions = metrics.executions.labels(*labels)
        self._queue = metrics.queue_duration.labels(*labels)
        self._compute = metrics.compute_duration.labels(*labels)
        self._batch = metrics.batch_size.labels(*labels)
        self.decode = metrics.decode_duration.labels(*labels)
        metrics.queue_depth.labels(*labels).set_function(depth)
        metrics.inflight.labels(*labels).set_function(inflight)

    def set_state(self, state: str) -> None:
        """Marks the model as loading, ready, failed or draining."""
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
        self._inferences.inc(rows)
        self._queue.observe((timings.started - timings.queued) / 1e9)
        self._compute.observe((timings.infer_done - timings.started) / 1e9)

    def rejected(self, reason: str) -> None:
        """A request was refused or given up."""
        self._metrics.rejected.labels(*self._labels, reason).inc()


class TritonAliases:
    """The same facts under Triton's names and units, for dashboards and autoscalers that know those.

    A custom collector: it reads the statistics when it is scraped.
    """

    def __init__(self, models: Callable[[], Iterable[tuple[str, str, Statistics, int]]]) -> None:
        self._models = models

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
            for stage, part in (
                ("request", totals.success),
                ("queue", totals.queue),
                ("compute_input", totals.input),
                ("compute_infer", totals.infer),
                ("compute_output", totals.output),
            ):
                add(f"nv_inference_{stage}_duration_us", f"Microseconds of {stage}", part.ns // 1000)
        return families.values()
