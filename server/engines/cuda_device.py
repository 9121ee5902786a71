"""One NVIDIA GPU by NVIDIA's own Python bindings of the CUDA runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from cuda.bindings import runtime as cuda
from cuda.bindings.utils import get_cuda_native_handle

from convoynet.server.engines.device import DeviceError, Event, Graph, OutOfMemory, Stream
from convoynet.server.types import Tensor


class CudaDevice:
    """See Device. Its constructor raises DeviceError where there is no such GPU, or no driver."""

    def __init__(self, ordinal: int) -> None:
        count = _done(cuda.cudaGetDeviceCount())
        if ordinal >= count:
            raise DeviceError(f"there is no GPU {ordinal}, but GPUs 0 to {count - 1}")
        _done(cuda.cudaSetDevice(ordinal))
        properties = _done(cuda.cudaGetDeviceProperties(ordinal))
        self.name = properties.name.decode()
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self._undo = contextlib.ExitStack()

    def memory(self) -> tuple[int, int]:
        """See Device."""
        free, total = _done(cuda.cudaMemGetInfo())
        return free, total

    def allocate(self, nbytes: int) -> int:
        """See Device."""
        address: int = _done(cuda.cudaMalloc(nbytes))
        self._undo.callback(cuda.cudaFree, address)
        return address

    def pin(self, memory: Tensor) -> None:
        """See Device."""
        _done(cuda.cudaHostRegister(memory.ctypes.data, memory.nbytes, cuda.cudaHostRegisterDefault))
        self._undo.callback(cuda.cudaHostUnregister, memory.ctypes.data)

    def stream(self) -> Stream:
        """See Device."""
        handle = get_cuda_native_handle(_done(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)))
        self._undo.callback(cuda.cudaStreamDestroy, handle)
        return Stream(handle)

    def event(self) -> Event:
        """See Device."""
        flags = cuda.cudaEventDisableTiming | cuda.cudaEventBlockingSync
        handle = get_cuda_native_handle(_done(cuda.cudaEventCreateWithFlags(flags)))
        self._undo.callback(cuda.cudaEventDestroy, handle)
        return Event(handle)

    def copy_in(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """See Device."""
        _done(cuda.cudaMemcpyAsync(target, source, nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream))

    def copy_out(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """See Device."""
        _done(cuda.cudaMemcpyAsync(target, source, nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream))

    def record(self, event: Event, stream: Stream) -> None:
        """See Device."""
        _done(cuda.cudaEventRecord(event, stream))

    def wait(self, stream: Stream, event: Event) -> None:
        """See Device."""
        _done(cuda.cudaStreamWaitEvent(stream, event, cuda.cudaEventWaitDefault))

    def synchronize(self, event: Event) -> None:
        """See Device."""
        _done(cuda.cudaEventSynchronize(event))

    def capture(self, stream: Stream, work: Callable[[], Any]) -> Graph:
        """See Device."""
        _done(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        try:
            work()
        except BaseException:
            cuda.cudaStreamEndCapture(stream)
            raise
        captured = _done(cuda.cudaStreamEndCapture(stream))
        try:
            graph = _done(cuda.cudaGraphInstantiate(captured, 0))
        finally:
            cuda.cudaGraphDestroy(captured)
        self._undo.callback(cuda.cudaGraphExecDestroy, graph)
        return Graph(graph)

    def launch(self, graph: Graph, stream: Stream) -> None:
        """See Device."""
        _done(cuda.cudaGraphLaunch(graph, stream))

    def close(self) -> None:
        """See Device."""
        self._undo.close()


def _done(result: tuple[Any, ...]) -> Any:
    """What a call gave back beside its error: nothing, one value, or several.

    Raises:
        DeviceError: It failed.
    """
    error, *values = result
    if error != cuda.cudaError_t.cudaSuccess:
        _, text = cuda.cudaGetErrorString(error)
        kind = OutOfMemory if error == cuda.cudaError_t.cudaErrorMemoryAllocation else DeviceError
        raise kind(f"{text.decode()} ({error.name})")
    return values[0] if len(values) == 1 else tuple(values)
