"""The series: each documented, none left of a model that is gone."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from convoynet.server.errors import ServerError
from convoynet.server.observing.metrics import Levels, Metrics, ModelMetrics, TritonAliases
from convoynet.server.observing.statistics import Statistics

DOCUMENT = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()


def test_the_document_names_every_series_and_no_other() -> None:
    registry = CollectorRegistry()
    Metrics(registry, "1")
    # The process's and Python's own series are prometheus_client's on every server; the document names the groups.
    suffix = {"counter": "_total"}
    names = {
        family.name + suffix.get(family.type, "")
        for family in registry.collect()
        if not family.name.startswith(("process_", "python_"))
    }
    documented = set(re.findall(r"^\| `(convoy_\w+)`", DOCUMENT, re.MULTILINE))
    # test_gpu_telemetry.py holds the GPUs' against the document.
    assert {name for name in documented if not name.startswith("convoy_gpu_")} == names


def test_the_document_names_every_alias() -> None:
    for family in TritonAliases(lambda: [("m", "1", Statistics(), 0)]).collect():
        name = re.sub(r"_(request|queue|compute_\w+)_duration_us", "_*_duration_us", family.name)
        assert f"`{name}`" in DOCUMENT, name


def _errors(of: type[ServerError] = ServerError) -> list[type[ServerError]]:
    return [of, *(each for below in of.__subclasses__() for each in _errors(below))]


def test_the_document_names_every_reason_of_a_refusal() -> None:
    (row,) = (line for line in DOCUMENT.splitlines() if line.startswith("| `convoy_rejected_total`"))
    for reason in {each.rejected for each in _errors()} - {None} | {"cancelled"}:
        assert f"`{reason}`" in row


def test_the_series_of_an_unloaded_version_disappear() -> None:
    metrics = Metrics(CollectorRegistry(), "1")
    kept, gone = (ModelMetrics(metrics, ("m", version), Levels(depth=lambda: 1)) for version in ("1", "2"))
    for each, version in ((kept, "1"), (gone, "2")):
        each.set_state("ready")
        each.loaded(1.0)
        each.batch(3)
        each.rejected("deadline")
        metrics.requests.labels("m", version, "grpc", "OK").inc()
        metrics.request_duration.labels("m", version).observe(1)
    before = generate_latest(metrics.registry).decode()
    assert before.count('model="m",version="2"') == before.count('model="m",version="1"') > 100
    gone.remove()
    after = generate_latest(metrics.registry).decode()
    assert 'model="m",version="2"' not in after
    assert not re.findall(r'model="m".*version="2"', after)
    assert after.count('version="1"') == before.count('version="1"')


def test_host_and_process_are_told() -> None:
    metrics = Metrics(CollectorRegistry(), "1")
    value = metrics.registry.get_sample_value
    assert (value("process_resident_memory_bytes") or 0) > 2**20
    assert (value("convoy_host_cpu_seconds_total", {"mode": "busy"}) or 0) > 0
    total = value("convoy_host_memory_bytes", {"kind": "total"}) or 0
    assert 0 < (value("convoy_host_memory_bytes", {"kind": "available"}) or 0) < total
    aliases = {family.name: family.samples[0].value for family in TritonAliases(list).collect()}
    assert 0 <= aliases["nv_cpu_utilization"] <= 1
    assert aliases["nv_cpu_memory_total_bytes"] == total


def test_what_could_not_be_loaded_is_told_until_it_can() -> None:
    metrics = Metrics(CollectorRegistry(), "1")
    failed = [("m", "2"), ("broken", "")]
    metrics.failed = lambda: failed
    text = generate_latest(metrics.registry).decode()
    assert 'convoy_model_load_failed{model="m",version="2"} 1.0' in text
    assert 'convoy_model_load_failed{model="broken",version=""} 1.0' in text
    failed.clear()
    assert "convoy_model_load_failed{" not in generate_latest(metrics.registry).decode()


def test_what_alerts_look_at_begins_at_zero() -> None:
    """Prometheus sees no increase in the first value of a series: the first error would be lost."""
    metrics = Metrics(CollectorRegistry(), "1")
    ModelMetrics(metrics, ("m", "1"), Levels())
    labels = {"model": "m", "version": "1"}
    for code in ("OK", "INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"):
        for protocol in ("grpc", "http"):
            more = {"protocol": protocol, "code": code}
            assert metrics.registry.get_sample_value("convoy_requests_total", {**labels, **more}) == 0
    for reason in ("queue_full", "deadline"):
        assert metrics.registry.get_sample_value("convoy_rejected_total", {**labels, "reason": reason}) == 0
