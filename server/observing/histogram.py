"""Counters and histograms for the request path: a tenth of the cost of prometheus_client's own, the same exposition.

They live on the event loop, so they take no lock; a scrape on another thread may see a count that is one request ahead
of its sum, never a torn value.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString


class Count:
    """One series of a Counter."""

    __slots__ = ("created", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.created = time.time_ns() / 1e9

    def inc(self, amount: float = 1) -> None:
        """Adds to it."""
        self.value += amount


class Distribution:
    """One series of a Histogram: how many values each bucket has, the last one those above every bound."""

    __slots__ = ("_bounds", "counts", "created", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.created = time.time_ns() / 1e9

    def observe(self, value: float) -> None:
        """Counts one value; a bucket takes what equals its bound."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


Series = TypeVar("Series", Count, Distribution)


class _Family(Generic[Series]):
    """The series of one name, by the values of its labels."""

    def __init__(self, name: str, text: str, labels: Iterable[str], make: Callable[[], Series]) -> None:
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._make: Callable[[], Series] = make
        self._series: dict[tuple[str, ...], Series] = {}

    def labels(self, *values: str) -> Series:
        """The series of these values, made where it is new."""
        series = self._series.get(values)
        if series is None:
            if len(values) != len(self._labels):
                raise ValueError(f"{self._name} has the labels {', '.join(self._labels)}, got {len(values)} values")
            series = self._series[values] = self._make()
        return series

    def find(self, *values: str) -> Series | None:
        """The series of these values, where there is one."""
        return self._series.get(values)

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Takes away every series that has all of these."""
        at = {self._labels.index(name): value for name, value in labels.items()}
        for values in [v for v in self._series if all(v[i] == value for i, value in at.items())]:
            del self._series[values]


class Counter(_Family[Count]):
    """What prometheus_client.Counter is, with positional labels alone."""

    def __init__(self, name: str, text: str, labels: Iterable[str], registry: CollectorRegistry) -> None:
        super().__init__(name.removesuffix("_total"), text, labels, Count)
        registry.register(self)

    def values(self) -> list[tuple[tuple[str, ...], float]]:
        """The labels of every series, and what it has counted."""
        return [(labels, series.value) for labels, series in self._series.items()]

    def collect(self) -> Iterable[Metric]:
        """The family of now (prometheus_client's collector protocol)."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, series in list(self._series.items()):
            family.add_metric(values, series.value, created=series.created)
        return [family]


class Histogram(_Family[Distribution]):
    """What prometheus_client.Histogram is, with positional labels alone."""

    def __init__(
        self, name: str, text: str, labels: Iterable[str], *, buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        super().__init__(name, text, labels, lambda: Distribution(buckets))
        self._bounds = [floatToGoString(b) for b in (*buckets, float("inf"))]  # type: ignore[no-untyped-call]
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The family of now (prometheus_client's collector protocol)."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, series in list(self._series.items()):
            total, buckets = 0, []
            for bound, count in zip(self._bounds, list(series.counts), strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric(values, buckets, series.sum)
            family.add_sample(f"{self._name}_created", dict(zip(self._labels, values, strict=True)), series.created)
        return [family]
