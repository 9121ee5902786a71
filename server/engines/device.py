"""What the pipeline of a GPU engine asks of a GPU; server/engines/cuda_device.py does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NewType, Protocol

from convoynet.server.types import Tensor

Stream = NewType("Stream", int)
"""A CUDA stream's handle: operations of one stream happen one after another."""
Event = NewType("Event", int)
Graph = NewType("Graph", object)


class DeviceError(Exception):
    """The GPU or its driver refused something; the message is one line."""


class OutOfMemory(DeviceError):
    """The GPU has not enough memory."""


class Device(Protocol):
    """One GPU. Addresses and sizes are in bytes; nothing but `synchronize` waits. All of it raises DeviceError."""

    name: str
    """Such as "NVIDIA H100 80GB HBM3"."""
    compute_capability: str
    """Such as "9.0"."""

    def memory(self) -> tuple[int, int]:
        """Free and all memory of the GPU, in bytes."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Memory on the GPU, aligned to 256 bytes, until close()."""
        ...

    def pin(self, memory: Tensor) -> None:
        """Keeps host memory, UINT8 [n], in RAM until close(), so that the GPU copies from and to it by itself."""
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...

    def event(self) -> Event:
        """A new event, which was never recorded."""
        ...

    def copy_in(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copies from host memory at `source` to the GPU's at `target`, in the order of the stream."""
        ...

    def copy_out(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copies from the GPU's memory at `source` to host memory at `target`, in the order of the stream."""
        ...

    def record(self, event: Event, stream: Stream) -> None:
        """The event is over when all that was given to the stream so far is."""
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """What is given to the stream from now on begins when the event, as recorded last, is over."""
        ...

    def synchronize(self, event: Event) -> None:
        """Waits, without a spinning thread, until the event, as recorded last, is over."""
        ...

    def capture(self, stream: Stream, work: Callable[[], Any]) -> Graph:
        """What `work` gives to the stream, as a graph; none of it is done."""
        ...

    def launch(self, graph: Graph, stream: Stream) -> None:
        """Does all of a graph, in the order of the stream."""
        ...

    def close(self) -> None:
        """Gives everything back."""
        ...
