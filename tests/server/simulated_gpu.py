"""A GPU of NumPy arrays that does things as late and in as odd an order as CUDA may, and checks who touches what.

Operations wait in their streams until somebody synchronizes; then streams go on in an order that chance decides, each
event holding back whoever waits for it. A read of what another stream may still write, a write to what one may still
read, an allocation after `freeze()` and an event that was never recorded are errors.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from convoynet.server.engines.device import DeviceError, Event, Graph, OutOfMemory, Stream
from convoynet.server.types import Tensor

_FIRST_ADDRESS = 1 << 44
_ROOM = 1 << 24


class RaceFound(AssertionError):
    """Two operations touch the same memory, and nothing says which comes first."""


@dataclass(eq=False)
class Operation:
    """One thing in a stream: what it reads and writes, and what must be over before."""

    work: Callable[[], None]
    reads: frozenset[object] = frozenset()
    writes: frozenset[object] = frozenset()
    after: list[Operation] = field(default_factory=list)
    done: bool = False

    def ancestors(self) -> set[Operation]:
        """All that is known to come before."""
        found: set[Operation] = set()
        left = list(self.after)
        while left:
            one = left.pop()
            if one not in found:
                found.add(one)
                left.extend(one.after)
        return found


class SimulatedGpu:
    """See Device."""

    name = "Simulated GPU"
    compute_capability = "9.0"

    def __init__(self, seed: int = 0, memory: int = 1 << 30) -> None:
        self._chance = random.Random(seed)
        self._total = memory
        self._used = 0
        self._numbers = count(1)
        self._memory: dict[int, Tensor] = {}
        self._streams: dict[Stream, deque[Operation]] = {}
        self._last: dict[Stream, list[Operation]] = {}
        self._events: dict[Event, Operation | None] = {}
        self._waits: dict[Stream, list[Operation]] = {}
        self._capturing: list[Operation] | None = None
        self._capturing_on: Stream | None = None
        self._frozen = False
        self.pinned: list[tuple[int, int]] = []
        self.launched = 0
        self.captures = True
        self.closed = False

    def freeze(self) -> None:
        """Nothing may be allocated from now on."""
        self._frozen = True

    def memory(self) -> tuple[int, int]:
        return self._total - self._used, self._total

    def allocate(self, nbytes: int) -> int:
        self._no_allocation("memory")
        if nbytes > self._total - self._used:
            raise OutOfMemory("out of memory")
        self._used += nbytes
        address = _FIRST_ADDRESS + _ROOM * next(self._numbers)
        self._memory[address] = np.full(nbytes, 0xA5, np.uint8)
        return address

    def pin(self, memory: Tensor) -> None:
        self.pinned.append((memory.ctypes.data, memory.nbytes))

    def stream(self) -> Stream:
        self._no_allocation("a stream")
        stream = Stream(next(self._numbers))
        self._streams[stream], self._last[stream], self._waits[stream] = deque(), [], []
        return stream

    def event(self) -> Event:
        self._no_allocation("an event")
        event = Event(next(self._numbers))
        self._events[event] = None
        return event

    def copy_in(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        def work() -> None:
            self._memory[target][:nbytes] = _host(source, nbytes)

        self._queue(stream, Operation(work, frozenset({("host", source)}), frozenset({target})))

    def copy_out(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        def work() -> None:
            _host(target, nbytes)[:] = self._memory[source][:nbytes]

        self._queue(stream, Operation(work, frozenset({source}), frozenset({("host", target)})))

    def compute(
        self, stream: Stream, work: Callable[[], None], reads: frozenset[object], writes: frozenset[object]
    ) -> None:
        """What a kernel would do."""
        self._queue(stream, Operation(work, reads, writes))

    def array(self, address: int, dtype: Any, shape: tuple[int, ...]) -> Tensor:
        """What lies on the GPU."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self._memory[address][:size].view(dtype).reshape(shape)

    def record(self, event: Event, stream: Stream) -> None:
        marker = Operation(lambda: None)
        self._queue(stream, marker)
        self._events[event] = marker

    def wait(self, stream: Stream, event: Event) -> None:
        marker = self._recorded(event)
        self._waits[stream].append(marker)

    def synchronize(self, event: Event) -> None:
        marker = self._recorded(event)
        while not marker.done:
            ready = [s for s, queue in self._streams.items() if queue and all(a.done for a in queue[0].after)]
            if not ready:
                raise AssertionError("deadlock: every stream waits for another")
            operation = self._streams[self._chance.choice(ready)].popleft()
            operation.work()
            operation.done = True

    def capture(self, stream: Stream, work: Callable[[], Any]) -> Graph:
        self._no_allocation("a graph")
        if not self.captures:
            raise DeviceError("operation not permitted when stream is capturing (cudaErrorStreamCaptureUnsupported)")
        self._capturing, self._capturing_on = [], stream
        try:
            work()
            return Graph(tuple(self._capturing))
        finally:
            self._capturing = self._capturing_on = None

    def launch(self, graph: Graph, stream: Stream) -> None:
        self.launched += 1
        for one in graph:  # type: ignore[attr-defined]
            self._queue(stream, Operation(one.work, one.reads, one.writes))

    def close(self) -> None:
        self.closed = True

    @contextmanager
    def host_may_touch(self, address: int) -> Iterator[None]:
        """The host reads or writes its own memory here: nothing on its way may do so as well."""
        for operation in self._pending():
            if ("host", address) in operation.reads | operation.writes:
                raise RaceFound("the host touches a buffer that is still being copied")
        yield

    def _pending(self) -> list[Operation]:
        return [one for queue in self._streams.values() for one in queue]

    def _recorded(self, event: Event) -> Operation:
        marker = self._events[event]
        if marker is None:
            raise AssertionError("an event is used before it was recorded")
        return marker

    def _queue(self, stream: Stream, operation: Operation) -> None:
        if self._capturing is not None:
            if stream != self._capturing_on:
                raise DeviceError("another stream is capturing")
            self._capturing.append(operation)
            return
        operation.after = [*self._last[stream], *self._waits[stream]]
        self._last[stream], self._waits[stream] = [operation], []
        known = operation.ancestors()
        for other in self._pending():
            both = operation.writes & (other.reads | other.writes) or operation.reads & other.writes
            if both and other not in known:
                raise RaceFound(f"nothing orders two operations that touch {sorted(map(str, both))}")
        self._streams[stream].append(operation)

    def _no_allocation(self, what: str) -> None:
        if self._frozen:
            raise AssertionError(f"{what} is allocated while batches run")


def _host(address: int, nbytes: int) -> Tensor:
    return np.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), np.uint8)
