"""Batches of a GPU engine on their way: copied in, computed and copied out, those of several slots at once.

```
stream "incoming"   | copy in A | copy in B |           | copy in A |
stream of the lane              | compute A | compute B             | compute A
stream "outgoing"                           | copy out A | copy out B
```

A lane computes one batch after another, and has two slots: while one of them computes, the other is copied. Everything
is allocated when the pipeline is made; a batch only queues operations. An event between two streams says that the one
may go on; the host waits for the last of them alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from convoynet.server.engines.device import Device, DeviceError, Event, Stream
from convoynet.server.scheduling.buckets import pad_to

_RUNS = 5


class Copy(NamedTuple):
    """Bytes of a tensor between the host's memory and a slot's."""

    name: str
    address: int
    nbytes: int


@dataclass
class GpuSlot:
    """What one batch has on the GPU.

    Attributes:
        lane: Which lane computes it.
        stream: That lane's.
        addresses: Of its inputs and outputs, by name.
        copied, computed, done: Its inputs are there; its outputs are there; its outputs are in the host's memory.
        launches: What computes a batch of so many rows.
    """

    lane: int
    stream: Stream
    addresses: Mapping[str, int]
    copied: Event
    computed: Event
    done: Event
    launches: dict[int, Callable[[], None]] = field(default_factory=dict)


class GpuPipeline:
    """Slots of a GPU and what is queued for them.

    Attributes:
        device: The GPU.
        incoming, outgoing: The streams of copies.
        slots: Two a lane; the batch in one of them must be waited for before the next is submitted there.
    """

    def __init__(self, device: Device, sizes: Mapping[str, int], lanes: int) -> None:
        """Allocates everything.

        Args:
            device: The GPU.
            sizes: Bytes of each input and output of the largest batch, by name.
            lanes: How many batches are computed at a time.

        Raises:
            DeviceError: The GPU has not enough memory, or failed.
        """
        self.device = device
        self.incoming, self.outgoing = device.stream(), device.stream()
        streams = [device.stream() for _ in range(lanes)]
        self.slots = [
            GpuSlot(
                index % lanes,
                streams[index % lanes],
                {name: device.allocate(max(nbytes, 1)) for name, nbytes in sizes.items()},
                device.event(),
                device.event(),
                device.event(),
            )
            for index in range(2 * lanes)
        ]

    def learn(self, slot: int, rows: int, enqueue: Callable[[Stream], None], *, graph: bool) -> str:
        """Teaches a slot to compute batches of `rows` rows, and computes one on what lies there.

        Args:
            slot: Index of the slot.
            rows: Of the batch.
            enqueue: Queues the computation on a stream, from and to the slot's addresses.
            graph: Whether to capture it as a graph, which is launched as a whole.

        Returns:
            Why there is no graph although there should be one; "".

        Raises:
            DeviceError: It cannot be computed.
        """
        own, why = self.slots[slot], ""
        plain = own.launches[rows] = lambda: enqueue(own.stream)
        # What a first run does once, such as loading kernels, must not be captured.
        self._compute(own, rows)
        if graph:
            try:
                captured = self.device.capture(own.stream, plain)
                own.launches[rows] = lambda: self.device.launch(captured, own.stream)
                self._compute(own, rows)
            except DeviceError as error:
                own.launches[rows] = plain
                why = str(error)
        return why

    def forget(self, slot: int, rows: int) -> None:
        """Computes batches of `rows` rows as larger ones from now on."""
        del self.slots[slot].launches[rows]

    def seconds(self, slot: int, rows: int) -> float:
        """The least time of some computations of a batch that lies on the GPU."""
        times = []
        for _ in range(_RUNS):
            begun = time.perf_counter()
            self._compute(self.slots[slot], rows)
            times.append(time.perf_counter() - begun)
        return min(times)

    def batch(self, slot: int, rows: int, inputs: Sequence[Copy], outputs: Sequence[Copy]) -> GpuBatch:
        """Batches of up to `rows` rows in a slot, with their inputs and outputs always in the same host memory."""
        own = self.slots[slot]
        launch = own.launches[pad_to(rows, tuple(sorted(own.launches)))]
        return GpuBatch(self, own, launch, inputs, outputs)

    def _compute(self, slot: GpuSlot, rows: int) -> None:
        slot.launches[rows]()
        self.device.record(slot.done, slot.stream)
        self.device.synchronize(slot.done)


class GpuBatch:
    """See Running."""

    def __init__(
        self,
        pipeline: GpuPipeline,
        slot: GpuSlot,
        launch: Callable[[], None],
        inputs: Sequence[Copy],
        outputs: Sequence[Copy],
    ) -> None:
        self._device, self._slot, self._launch = pipeline.device, slot, launch
        self._incoming, self._outgoing = pipeline.incoming, pipeline.outgoing
        self._inputs = [(slot.addresses[one.name], one.address, one.nbytes) for one in inputs]
        self._outputs = [(one.address, slot.addresses[one.name], one.nbytes) for one in outputs]

    def submit(self) -> None:
        """See Running.submit."""
        device, slot = self._device, self._slot
        for target, source, nbytes in self._inputs:
            device.copy_in(target, source, nbytes, self._incoming)
        device.record(slot.copied, self._incoming)
        device.wait(slot.stream, slot.copied)
        self._launch()
        device.record(slot.computed, slot.stream)
        device.wait(self._outgoing, slot.computed)
        for target, source, nbytes in self._outputs:
            device.copy_out(target, source, nbytes, self._outgoing)
        device.record(slot.done, self._outgoing)

    def wait(self) -> None:
        """See Running.wait."""
        self._device.synchronize(self._slot.done)
