"""How much of the machine other processes take while something is timed."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
# The columns of a line of /proc/stat (man 5 proc): user, nice, system, idle, iowait, irq, softirq, steal; guests count
# as users already. Stolen time is other machines' on the same host.
_COLUMNS = 8
_IDLE = (3, 4)


@dataclass(frozen=True)
class Load:
    """What other processes took, in cores, of those that this one may use; `others` is None where nobody knows."""

    others: float | None
    cores: int

    def contested(self, threads: int) -> float:
        """The share (0 to 1) of what so many threads need that others took from them; 0 where nobody knows."""
        if self.others is None:
            return 0.0
        return min(1.0, max(0.0, self.others + min(threads, self.cores) - self.cores) / min(threads, self.cores))


class Meter:
    """Reads the clocks of the processors now, and again when it is asked for the load since."""

    def __init__(self, stat: Path = _STAT) -> None:
        self._stat = stat
        self._began = self._read()

    def load(self) -> Load:
        """The load since the meter was made."""
        (busy, own, at), (busy_before, own_before, began) = self._read(), self._began
        cores = len(_mine())
        if busy is None or busy_before is None or at <= began:
            return Load(None, cores)
        together, mine = busy - busy_before, own - own_before
        if together < mine / 2:  # what runs this shows clocks that stand still
            return Load(None, cores)
        return Load(round(max(0.0, together - mine) / (at - began), 2), cores)

    def _read(self) -> tuple[float | None, float, float]:
        """Seconds that the cores were busy, that this process computed, and that have passed."""
        return busy_seconds(self._stat), time.process_time(), time.perf_counter()


def _mine() -> set[int]:
    """The cores that this process may use; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def busy_seconds(stat: Path = _STAT) -> float | None:
    """Seconds that the cores which this process may use were busy since the start; None where nothing tells."""
    mine = {f"cpu{number}" for number in _mine()}
    try:
        lines = [line.split() for line in stat.read_text(encoding="ascii").splitlines()]
        ticks = [
            int(value)
            for name, *values in filter(None, lines)
            if name in mine
            for place, value in enumerate(values[:_COLUMNS])
            if place not in _IDLE
        ]
    except (OSError, ValueError):
        return None
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None
