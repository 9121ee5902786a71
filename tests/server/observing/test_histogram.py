"""The request path's counters and histograms, beside prometheus_client's own."""

from __future__ import annotations

import re

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from convoynet.server.observing.histogram import Counter, Histogram

BOUNDS = (0.25, 0.5, 1, 10)


def exposed(registry: CollectorRegistry) -> str:
    """What a scrape reads, without the times of creation."""
    return re.sub(r"(_created{.*}) .*", r"\1", generate_latest(registry).decode())


@given(st.lists(st.floats(0, 20) | st.sampled_from(BOUNDS)), st.integers(0, 5))
def test_the_exposition_is_that_of_prometheus_client(values: list[float], count: int) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histograms = (
        Histogram("h_seconds", "What took so long", ("model", "version"), buckets=BOUNDS, registry=ours),
        prometheus_client.Histogram(
            "h_seconds", "What took so long", ("model", "version"), buckets=BOUNDS, registry=theirs
        ),
    )
    counters = (
        Counter("c_total", "What came", ("model", "code"), registry=ours),
        prometheus_client.Counter("c_total", "What came", ("model", "code"), registry=theirs),
    )
    for histogram in histograms:
        for value in values:
            histogram.labels("m", "1").observe(value)
        histogram.labels('quo"te\n', "2").observe(3)
    for counter in counters:
        for _ in range(count):
            counter.labels("m", "OK").inc()
        counter.labels("m", "NOT_FOUND").inc(2)
    assert exposed(ours) == exposed(theirs)


def test_series_of_a_model_that_is_gone_are_taken_away() -> None:
    registry = CollectorRegistry()
    counter = Counter("c_total", "What came", ("model", "version", "code"), registry=registry)
    for labels in (("m", "1", "OK"), ("m", "1", "INTERNAL"), ("m", "2", "OK"), ("n", "1", "OK")):
        counter.labels(*labels).inc()
    counter.remove_by_labels({"model": "m", "version": "1"})
    text = exposed(registry)
    assert 'version="2"' in text
    assert 'model="n"' in text
    assert 'model="m",version="1"' not in text
    with pytest.raises(ValueError, match="got 1 values"):
        counter.labels("m")
