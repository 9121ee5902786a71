"""Regions of POSIX shared memory that clients share with the server, so that tensors do not travel at all.

Off unless the server was told otherwise: who may register a region may make the server read and write what its own
user may in /dev/shm. There is no table of users of a region: tensors are views of its mapping, and the mapping goes
away with the last of them, so that a region that is unregistered in the middle of a request lives until its end.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from server.errors import InvalidRegion, InvalidRequest, RegionExists, UnknownRegion

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


class Regions:
    """The regions that are registered, by name."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}

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
        if name in self._regions:
            raise RegionExists(name)
        if not _NAME.fullmatch(name) or len(self._regions) >= _MOST:
            raise InvalidRegion(
                f"Invalid shared memory region name {name[:128]!r}: 1 to 128 of letters, digits and _.:/- are allowed, "
                f"and {_MOST} regions at once"
            )
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

    def unregister(self, name: str = "") -> None:
        """Forgets a region, "" for all; one that is not registered is none already."""
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def status(self, name: str = "") -> list[Region]:
        """One region, "" for all.

        Raises:
            UnknownRegion: It is not registered.
        """
        if not name:
            return list(self._regions.values())
        if name not in self._regions:
            raise UnknownRegion(f"Unable to find system shared memory region: '{name}'")
        return [self._regions[name]]

    def view(self, name: str, offset: int, size: int) -> memoryview:
        """Bytes of a region, writable, without a copy. The mapping stays as long as the view does.

        Raises:
            UnknownRegion: It is not registered.
            InvalidRequest: It has not these bytes, or its owner made the object smaller meanwhile.
        """
        region = self._regions.get(name)
        if region is None:
            raise UnknownRegion(f"Unable to find shared memory region: '{name}'")
        if not 0 <= offset < region.size:
            raise InvalidRequest(f"Invalid offset for shared memory region: '{name}'")
        first = region.offset + offset
        # The object's size of now: to touch what its owner cut off would end the process.
        if size < 1 or offset + size > region.size or first + size > region.memory.size():
            raise InvalidRequest(f"Invalid offset + byte size for shared memory region: '{name}'")
        return memoryview(region.memory)[first : first + size]
