"""Memory that a client has on a GPU, opened in the server's process through CUDA's own bindings.

The bytes go through page-locked memory of the host, since engines are processes of their own, and take their inputs
from there. CUDA starts with the first region that a client registers: what a context takes of the GPU's memory is only
taken where somebody uses this.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from importlib import import_module
from typing import Any

from convoynet.server.errors import InvalidRegion, Unimplemented

_HANDLE_BYTES = 64
_PORTABLE = 1
"""cudaHostAllocPortable: page-locked for every GPU."""


def open_device_memory(handle: bytes, device: int, size: int) -> CudaMemory:
    """Opens a client's memory (shared_memory.DeviceMemory).

    Args:
        handle: As cudaIpcGetMemHandle() makes it.
        device: CUDA's number of the GPU.
        size: Bytes, as the client states them.

    Raises:
        InvalidRegion: There is no such GPU, the handle is no good, or the memory has not so many bytes.
        Unimplemented: There is no CUDA, or no GPU.
    """
    try:
        runtime, driver = import_module("cuda.bindings.runtime"), import_module("cuda.bindings.driver")
    except ImportError as error:
        raise Unimplemented(
            "CUDA shared memory needs the package cuda-bindings on the server (pip install 'convoynet[gpu]'); register "
            "system shared memory instead"
        ) from error
    status, devices = runtime.cudaGetDeviceCount()
    if status or not devices:
        raise Unimplemented(
            f"CUDA shared memory needs an NVIDIA GPU and its driver on the server ({_name(runtime, status)}); register "
            "system shared memory instead"
        )
    if not 0 <= device < devices:
        raise InvalidRegion(f"Invalid device id {device} of a CUDA shared memory region: there are 0 to {devices - 1}")
    return CudaMemory(runtime, driver, handle, device, size)


class CudaMemory:
    """See shared_memory.DeviceMemory."""

    def __init__(self, runtime: Any, driver: Any, handle: bytes, device: int, size: int) -> None:
        self._runtime, self._device = runtime, device
        opened = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(opened.getPtr(), handle, _HANDLE_BYTES)
        self._call(runtime.cudaSetDevice, device)
        self._address = int(self._call(runtime.cudaIpcOpenMemHandle, opened, runtime.cudaIpcMemLazyEnablePeerAccess))
        try:
            self._check(driver, size)
            pinned = int(self._call(runtime.cudaHostAlloc, size, _PORTABLE))
        except InvalidRegion:
            runtime.cudaIpcCloseMemHandle(self._address)
            raise
        memory = (ctypes.c_ubyte * size).from_address(pinned)
        self.host = memoryview(memory).cast("B")
        self._pinned = pinned
        # With the last view of it, which a request may have that outlives the region.
        weakref.finalize(memory, _give_back, runtime, device, self._address, pinned)

    def fetch(self, offset: int, size: int) -> None:
        """See DeviceMemory."""
        self._copy(self._pinned + offset, self._address + offset, size, "cudaMemcpyDeviceToHost")

    def store(self, offset: int, data: bytes | memoryview) -> None:
        """See DeviceMemory."""
        self.host[offset : offset + len(data)] = data
        self._copy(self._address + offset, self._pinned + offset, len(data), "cudaMemcpyHostToDevice")

    def _check(self, driver: Any, size: int) -> None:
        """Holds what the client states against what is there."""
        found = self._call(self._runtime.cudaPointerGetAttributes, self._address)
        if found.type != self._runtime.cudaMemoryType.cudaMemoryTypeDevice or found.device != self._device:
            raise InvalidRegion(f"Invalid CUDA shared memory region: its memory is not on device {self._device}")
        status, base, allocated = driver.cuMemGetAddressRange(self._address)
        if status or self._address + size > int(base) + allocated:
            raise InvalidRegion(f"Invalid CUDA shared memory region: its memory has less than {size} bytes")

    def _copy(self, to: int, source: int, size: int, direction: str) -> None:
        self._call(self._runtime.cudaSetDevice, self._device)
        # Page-locked memory: the call comes back when the copy is done.
        self._call(self._runtime.cudaMemcpy, to, source, size, getattr(self._runtime.cudaMemcpyKind, direction))

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of the runtime yields."""
        status, *found = function(*arguments)
        if status:
            raise InvalidRegion(f"failed to use the CUDA shared memory region: {_name(self._runtime, status)}")
        return found[0] if found else None


def _give_back(runtime: Any, device: int, address: int, pinned: int) -> None:
    runtime.cudaSetDevice(device)
    runtime.cudaFreeHost(pinned)
    runtime.cudaIpcCloseMemHandle(address)


def _name(runtime: Any, status: Any) -> str:
    """What CUDA calls a status, in words."""
    return str(runtime.cudaGetErrorString(status)[1].decode())
