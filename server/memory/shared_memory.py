"""Regions of memory that clients share with the server, so that tensors do not travel at all: POSIX's, and CUDA's.

Off unless the server was told otherwise: who may register a region may make the server read and write what its own
user may in /dev/shm. There is no table of users of a region: tensors are views of its mapping, and the mapping goes
away with the last of them, so that a region that is unregistered in the middle of a request lives until its end.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from mmap import mmap
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


@dataclass(frozen=True)
class Region:
    """`size` bytes from `offset` of the object `key`, which clients call `name`; `memory` is mapped from its start."""

    name: str
    key: str
    offset: int
    size: int
    memory: mmap


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
class _Mapped:
    """Room for an output in POSIX shared memory (types.Place)."""

    view: memoryview

    @property
    def size(self) -> int:
        return len(self.view)

    def write(self, data: bytes | memoryview) -> None:
        self.view[: len(data)] = data


@dataclass(frozen=True)
class _OnDevice:
    """The same on a GPU."""

    memory: DeviceMemory
    offset: int
    size: int

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

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        """Maps a region.

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
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or offset < 0 or size < 1 or offset + size > found.st_size:
                raise InvalidRegion(f"Invalid shared memory region: '{key}'")
            self._regions[name] = Region(name, key, offset, size, mmap(descriptor, offset + size))
        finally:
            os.close(descriptor)

    async def register_cuda(self, name: str, handle: bytes, device: int, size: int) -> None:
        """Maps memory of a GPU, in a thread: the first time that takes as long as CUDA takes to start.

        Args:
            name: What requests call it.
            handle: Of the memory, 64 bytes, as cudaIpcGetMemHandle() makes it.
            device: CUDA's number of the GPU, as this process counts.
            size: How many bytes, from the memory's first one on.

        Raises:
            RegionExists: The name is taken.
            InvalidRegion: The handle cannot be opened there, or has not so many bytes.
            Unimplemented: There is no GPU, or no CUDA, in this process.
        """
        self._check_name(name)
        memory = await asyncio.to_thread(self._open_device, handle, device, size)
        self._check_name(name)  # which another call may have taken meanwhile
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

    def view(self, name: str, offset: int, size: int) -> memoryview:
        """Bytes of a region: of the mapping itself, which stays as long as the view does, or fetched from a GPU.

        Raises:
            UnknownRegion: It is not registered.
            InvalidRequest: It has not these bytes, or its owner made the object smaller meanwhile.
        """
        region = self._checked(name, offset, size)
        if isinstance(region, CudaRegion):
            region.memory.fetch(offset, size)
            return region.memory.host[offset : offset + size]
        first = region.offset + offset
        return memoryview(region.memory)[first : first + size]

    def place(self, name: str, offset: int, size: int) -> Place:
        """Room for an output in a region; what is raised is as for `view`."""
        region = self._checked(name, offset, size)
        if isinstance(region, CudaRegion):
            return _OnDevice(region.memory, offset, size)
        return _Mapped(self.view(name, offset, size))

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
        # The object's size of now: to touch what its owner cut off would end the process.
        cut = isinstance(region, Region) and region.offset + offset + size > region.memory.size()
        if size < 1 or offset + size > region.size or cut:
            raise InvalidRequest(f"Invalid offset + byte size for shared memory region: '{name}'")
        return region

    def _check_name(self, name: str) -> None:
        if name in self._regions:
            raise RegionExists(name)
        if not _NAME.fullmatch(name) or len(self._regions) >= _MOST:
            raise InvalidRegion(
                f"Invalid shared memory region name {name[:128]!r}: 1 to 128 of letters, digits and _.:/- are allowed, "
                f"and {_MOST} regions at once"
            )
