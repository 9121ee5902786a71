"""The machine: its cores, and the use of its CPU and memory from /proc, zeros where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_CGROUPS = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """The cores that this process may run on: those of its affinity, or fewer where its container has a CPU limit.

    Of a limit of 2.5 cores 2 count, at least 1: threads beyond it would be stopped amid a batch.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_cpu_limit(_CGROUPS, Path("/proc/self/cgroup")))))


def _cpu_limit(root: Path, own: Path) -> float:
    """The least `cpu.max` of a process's cgroup (version 2) and those above it, in cores; a million for no limit."""
    limit = 1e6
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return limit
    group = Path(next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), ""))
    # Of a group outside of this process's own root, which it sees as "..", nothing can be known.
    for folder in (group, *group.parents) if ".." not in group.parts else ():
        try:
            quota, period = (root / folder / "cpu.max").read_text(encoding="ascii").split()
            limit = min(limit, float(quota) / float(period))
        except (OSError, ValueError):  # no such file at the root of all groups; "max" is no limit
            continue
    return limit


def cpu_seconds() -> tuple[float, float]:
    """Seconds that all cores together were busy, and those that passed, since the machine started."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return 0.0, 0.0
    # user nice system idle iowait irq softirq steal; guests are in user already.
    seconds = [int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in line.split()[1:9]]
    return sum(seconds) - sum(seconds[3:5]), sum(seconds)


def memory_bytes() -> tuple[int, int]:
    """All of the memory, and what is available of it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024


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
