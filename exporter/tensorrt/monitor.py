"""TensorRT's progress monitor: nested phases of steps to one share of the work, and the way to end a build early."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convoynet.exporter.tensorrt.library import Library


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """The share of a build that is done, from what TensorRT says of its phases. Not for several threads at once."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` begins, within the current step of `parent`."""
        self._phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, index: int) -> float:
        """Step `index` of a phase is done; returns the share of the whole that is, 0 to 1, which never falls."""
        if name in self._phases:
            self._phases[name].done = index + 1
        roots = [self._done(name) for name, phase in self._phases.items() if phase.parent not in self._phases]
        # Several roots follow each other, and nothing says how many there will be.
        self._share = max(self._share, min(roots, default=0.0))
        return self._share

    def finish(self, name: str) -> None:
        """A phase ended."""
        self._phases.pop(name, None)

    def _done(self, name: str) -> float:
        phase = self._phases[name]
        inner = [self._done(child) for child, found in self._phases.items() if found.parent == name and child != name]
        return min(1.0, (phase.done + max(inner, default=0.0)) / phase.steps)


def monitor(library: Library, report: Callable[[float], None], cancelled: Callable[[], bool]) -> Any:
    """An IProgressMonitor that reports the share done, 0 to 1, and ends the build once `cancelled` says so.

    TensorRT calls it from threads of its own; nothing that it is given may raise.
    """

    class Monitor(library.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._phases = Phases()
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                report(self._phases.step(phase_name, step))
            return not cancelled()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.finish(phase_name)

    return Monitor()
