"""Regions of memory that clients share with the server, so that tensors do not travel at all: POSIX's, and CUDA's.

Off unless the server was told otherwise: who may register a region may make the server read and write what its own
user may in /dev/shm. Nothing of a client's is ever mapped: to touch a mapping whose object its owner has cut, or that
the full file system has no page for, ends the process. Bytes are read and written through the descriptor, which says
so in words. What is read is a copy, so that a client that writes on changes no request under way, and an output may go
where an input was. Whoever still has a place to write to keeps the object open: a region that is unregistered in the
middle of a request lives until its end.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from convoynet.server.errors import InvalidRegion, InvalidRequest, RegionExists, UnknownRegion
from convoynet.server.memory.shared_memory_cuda import open_device_memory
from convoynet.server.types import Place

_FOLDER = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
_KEY = re.compile(r"/?[A-Za-z0-9_-][A-Za-z0-9._-]{0,253}")
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_PRIVATE = "triton_python_backend_shm_region_"
_MOST = 4096
_SHARE = 4
"""Each region holds a descriptor: all together at most one of so many that the process may have."""

CUDA_BYTES = 2**30
"""The most that the regions of GPUs may have together: as much of the host's memory is page-locked for them."""


class _Object:
    """An object in POSIX shared memory; it is closed with the last that holds it.

    Attributes:
        identity: The same for every descriptor of the same object.
    """

    __slots__ = ("_descriptor", "identity")

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        found = os.fstat(descriptor)
        self.identity = (found.st_dev, found.st_ino)

    def __del__(self) -> None:
        os.close(self._descriptor)

    @property
    def size(self) -> int:
        """Its bytes now: its owner may change that at any time."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """A copy of bytes of it; fewer where they are not there any more."""
        data = os.pread(self._descriptor, size, offset)
        if 0 < len(data) < size:  # Linux gives 2 GiB at a time
            return data + self.read(offset + len(data), size - len(data))
        return data

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Overwrites bytes of it; raises OSError where that fails."""
        rest = memoryview(data)
        while rest.nbytes:
            written = os.pwrite(self._descriptor, rest, offset)
            rest, offset = rest[written:], offset + written


@dataclass(frozen=True)
class Region:
    """`size` bytes from `offset` of the object `key`, which clients call `name`."""

    name: str
    key: str
    offset: int
    size: int
    memory: _Object


class DeviceMemory(Protocol):
    """A client's memory on a GPU, and as much of the host's, through which its bytes come and go.

    It is given back when nobody has a view of `host` any more.
    """

    host: memoryview

    def fetch(self, offset: int, size: int) -> None:
        """Copies bytes of the GPU's to the same place of `host`; raises InvalidRegion where that fails."""
        ...

    def store(self, offset: int, data: bytes | memoryview) -> None:
        """Copies bytes to the GPU; raises InvalidRegion where that fails."""
        ...


@dataclass(frozen=True)
class CudaRegion:
    """`size` bytes of a client's memory on the GPU `device`, which clients call `name`."""

    name: str
    device: int
    size: int
    memory: DeviceMemory


_Kind = TypeVar("_Kind", Region, CudaRegion)
_WORDS: Mapping[type, str] = {Region: "system", CudaRegion: "CUDA"}


@dataclass(frozen=True)
class _InObject:
    """Room for an output in POSIX shared memory (types.Place)."""

    region: Region
    offset: int
    size: int

    @property
    def where(self) -> tuple[object, int]:
        return self.region.memory.identity, self.offset

    def write(self, data: bytes | memoryview) -> None:
        memory = self.region.memory
        try:
            # To write beyond its end would make the object larger again.
            if self.offset + len(data) <= memory.size:
                memory.write(self.offset, data)
                return
            why = "it was made smaller"
        except OSError as error:
            why = str(error.strerror)
        raise InvalidRegion(f"Unable to write to shared memory region '{self.region.name}': {why}")


@dataclass(frozen=True)
class _OnDevice:
    """The same on a GPU."""

    memory: DeviceMemory
    offset: int
    size: int

    @property
    def where(self) -> tuple[object, int]:
        return id(self.memory), self.offset

    def write(self, data: bytes | memoryview) -> None:
        self.memory.store(self.offset, data)


class Regions:
    """The regions that are registered, by name; POSIX's and CUDA's share the names.

    Args:
        open_device: Opens memory of a GPU: its handle (64 bytes), the device, and the size that the client states.
    """

    def __init__(self, open_device: Callable[[bytes, int, int], DeviceMemory] = open_device_memory) -> None:
        self._regions: dict[str, Region | CudaRegion] = {}
        self._open_device = open_device
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = _MOST if descriptors == resource.RLIM_INFINITY else min(_MOST, descriptors // _SHARE)

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        """Opens a region.

        Args:
            name: What requests call it.
            key: The POSIX name of the object, as shm_open() takes it.
            offset: Of the first of its bytes.
            size: How many bytes.

        Raises:
            RegionExists: The name is taken.
            InvalidRegion: There is no such object, or it has not these bytes.
        """
        self._check_name(name)
        if not _KEY.fullmatch(key) or key.lstrip("/").startswith(_PRIVATE):
            raise InvalidRegion(f"Unable to open shared memory region: '{key[:255]}'")
        try:
            descriptor = os.open(_FOLDER / key.lstrip("/"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InvalidRegion(f"Unable to open shared memory region: '{key}'") from error
        memory = _Object(descriptor)
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not is_file or offset < 0 or size < 1 or offset + size > memory.size:
            raise InvalidRegion(f"Invalid shared memory region: '{key}'")
        self._regions[name] = Region(name, key, offset, size, memory)

    async def register_cuda(self, name: str, handle: bytes, device: int, size: int) -> None:
        """Maps memory of a GPU, in a thread: the first time that takes as long as CUDA takes to start.

        Args:
            name: What requests call it.
            handle: Of the memory, 64 bytes, as cudaIpcGetMemHandle() makes it.
            device: CUDA's number of the GPU, as this process counts.
            size: How many bytes, from the memory's first one on.

        Raises:
            RegionExists: The name is taken.
            InvalidRegion: The handle cannot be opened there, or has not so many bytes, or they are too many.
            Unimplemented: There is no GPU, or no CUDA, in this process.
        """
        self._check_cuda(name, size)
        memory = await asyncio.to_thread(self._open_device, handle, device, size)
        self._check_cuda(name, size)  # another call may have taken name or room meanwhile
        self._regions[name] = CudaRegion(name, device, size, memory)

    def unregister(self, name: str = "", kind: type[Region] | type[CudaRegion] = Region) -> None:
        """Forgets a region of a kind, "" for all of it; one that is not registered is none already."""
        for each in [self._regions.get(name)] if name else list(self._regions.values()):
            if isinstance(each, kind):
                del self._regions[each.name]

    def status(self, name: str = "") -> list[Region]:
        """One region of POSIX shared memory, "" for all.

        Raises:
            UnknownRegion: It is not registered.
        """
        return self._of(Region, name)

    def cuda_status(self, name: str = "") -> list[CudaRegion]:
        """One region of CUDA's, "" for all.

        Raises:
            UnknownRegion: It is not registered.
        """
        return self._of(CudaRegion, name)

    def check(self, name: str, offset: int, size: int) -> None:
        """Checks that a region has bytes, without touching them.

        Raises:
            UnknownRegion: It is not registered.
            InvalidRequest: It has not these bytes, or its owner made the object smaller meanwhile.
        """
        self._checked(name, offset, size)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A copy of bytes of a region; what is raised is as for `check`."""
        region = self._checked(name, offset, size)
        if isinstance(region, CudaRegion):
            region.memory.fetch(offset, size)
            # Another request's bytes may come by the same place of the host's.
            return bytes(region.memory.host[offset : offset + size])
        data = region.memory.read(region.offset + offset, size)
        if len(data) < size:
            raise _cut(name)
        return data

    def place(self, name: str, offset: int, size: int) -> Place:
        """Room for an output in a region; what is raised is as for `check`."""
        region = self._checked(name, offset, size)
        if isinstance(region, CudaRegion):
            return _OnDevice(region.memory, offset, size)
        return _InObject(region, region.offset + offset, size)

    def _of(self, kind: type[_Kind], name: str) -> list[_Kind]:
        if not name:
            return [each for each in self._regions.values() if isinstance(each, kind)]
        region = self._regions.get(name)
        if region is None:
            raise UnknownRegion(f"Unable to find {_WORDS[kind].lower()} shared memory region: '{name}'")
        if not isinstance(region, kind):
            raise UnknownRegion(
                f"The region named '{name}' is registered as {_WORDS[type(region)]} shared memory, not {_WORDS[kind]} "
                "shared memory"
            )
        return [region]

    def _checked(self, name: str, offset: int, size: int) -> Region | CudaRegion:
        region = self._regions.get(name)
        if region is None:
            raise UnknownRegion(f"Unable to find shared memory region: '{name}'")
        if not 0 <= offset < region.size:
            raise InvalidRequest(f"Invalid offset for shared memory region: '{name}'")
        cut = isinstance(region, Region) and region.offset + offset + size > region.memory.size
        if size < 1 or offset + size > region.size or cut:
            raise _cut(name)
        return region

    def _check_cuda(self, name: str, size: int) -> None:
        self._check_name(name)
        room = CUDA_BYTES - sum(each.size for each in self._regions.values() if isinstance(each, CudaRegion))
        if size > room:
            raise InvalidRegion(
                f"Invalid CUDA shared memory region: it has {size} bytes, {room} more are allowed; the regions of GPUs "
                f"may have {CUDA_BYTES} together"
            )

    def _check_name(self, name: str) -> None:
        if name in self._regions:
            raise RegionExists(name)
        if not _NAME.fullmatch(name) or len(self._regions) >= self._most:
            raise InvalidRegion(
                f"Invalid shared memory region name {name[:128]!r}: 1 to 128 of letters, digits and _.:/- are allowed, "
                f"and {self._most} regions at once"
            )


def _cut(name: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid offset + byte size for shared memory region: '{name}'")
