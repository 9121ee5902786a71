"""What the server runs on: cores, CPU time and memory (from /proc, zeros without it), its cache, its own processes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cpus() -> int:
    """The cores that this process may run on: those of its affinity, or fewer where its container has a CPU limit.

    Of a limit of 2.5 cores 2 count, at least 1: threads beyond it would be stopped amid a batch.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_cpu_limit(_CGROUPS, _OWN))))


def available_memory() -> int:
    """The memory that this process may have, in bytes: the machine's, or less where its container has a limit."""
    return int(min(memory_bytes()[0] or math.inf, _memory_limit(_CGROUPS, _OWN), 2.0**50))


def _cpu_limit(root: Path, own: Path) -> float:
    """The least `cpu.max` of a process's cgroup (version 2) and those above it, in cores; a million for no limit."""
    texts = [text.split() for text in _of_groups(root, own, "cpu.max")]
    return min((float(quota) / float(period) for quota, period in texts if quota != "max"), default=1e6)


def _memory_limit(root: Path, own: Path) -> float:
    """The least `memory.max` of the same groups, in bytes; infinity for no limit."""
    return min((float(text) for text in _of_groups(root, own, "memory.max") if text != "max"), default=math.inf)


def _of_groups(root: Path, own: Path, name: str) -> Iterator[str]:
    """What a file says in a process's cgroup (version 2) and those above it."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    group = Path(next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), ""))
    # Of a group outside of this process's own root, which it sees as "..", nothing can be known.
    for folder in (group, *group.parents) if ".." not in group.parts else ():
        with suppress(OSError):  # no such file at the root of all groups
            yield (root / folder / name).read_text(encoding="ascii").strip()


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


def cache_folder() -> Path:
    """Where the server keeps what it would else find out or make again: $XDG_CACHE_HOME/convoy, if it is there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy"


def package_environment() -> dict[str, str]:
    """The environment in which `python -P -m convoynet.server...` finds this package.

    Not from where the server was started: a folder is no place to import from because somebody stands in it.
    """
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH", ""), root)))}
