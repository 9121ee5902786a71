"""Memory that the server and an engine process share, and where the tensors of a batch lie in it."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from convoynet.server import datatypes
from convoynet.server.types import Tensor

_ALIGNMENT = 64
"""Bytes: a cache line, and what the widest vector instructions like best."""
_SMALLEST = 1 << 16


class Slot(NamedTuple):
    """One tensor in a buffer; BYTES tensors lie there as the protocol serializes them."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    nbytes: int
    offset: int


class Table(NamedTuple):
    """Where the tensors of one batch lie, and how many bytes they take in all."""

    slots: tuple[Slot, ...]
    size: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> Table:
        """Lays tensors out one behind another; each is its name, datatype, dims and number of bytes."""
        slots, offset = [], 0
        for tensor in tensors:
            slots.append(Slot(*tensor, offset))
            offset += -(-tensor[3] // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(slots), offset)

    def to_json(self) -> str:
        """The table as a message carries it."""
        return json.dumps(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Table:
        """The table that `to_json` wrote."""
        slots, size = json.loads(text)
        return cls(tuple(Slot(name, datatype, tuple(dims), n, at) for name, datatype, dims, n, at in slots), size)


class SharedBuffer:
    """Anonymous memory behind a file descriptor, which two processes map; it only ever grows.

    Growing takes no message of its own: the writer makes the file longer, and whoever finds its mapping too short
    maps it anew. Arrays made before stay valid, they are of the same memory.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._mapped = 0

    @classmethod
    def create(cls, name: str) -> SharedBuffer:
        """New memory; `name` is for people who look at /proc."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create(name))
        descriptor, path = tempfile.mkstemp(prefix=name)
        os.unlink(path)  # noqa: PTH108 - the file lives on by its descriptor alone
        return cls(descriptor)

    def reach(self, size: int) -> bool:
        """Makes sure that `size` bytes are there and mapped; says whether a new mapping was needed for it.

        Raises:
            OSError: The system has no room for it.
        """
        if size <= self._mapped:
            return False
        have = os.fstat(self.descriptor).st_size
        if have < size:
            have = max(_SMALLEST, 1 << (size - 1).bit_length())
            os.ftruncate(self.descriptor, have)
        self._map = mmap.mmap(self.descriptor, have)
        self._mapped = have
        return True

    def array(self, slot: Slot) -> Tensor:
        """The tensor in a slot that `reach` made room for; for BYTES its serialized form, UINT8 [nbytes]."""
        if not slot.nbytes:  # nothing needs no place, and there may be none yet
            texts = slot.datatype == "BYTES"
            return np.empty(0, np.uint8) if texts else np.empty(slot.dims, datatypes.numpy_dtype(slot.datatype))
        memory = memoryview(self._map or b"")[slot.offset : slot.offset + slot.nbytes]
        if slot.datatype == "BYTES":
            return np.frombuffer(memory, np.uint8)
        return np.frombuffer(memory, datatypes.numpy_dtype(slot.datatype)).reshape(slot.dims)

    def whole(self) -> Tensor:
        """All of the memory, UINT8 [n]."""
        return np.frombuffer(self._map or b"", np.uint8)

    def close(self) -> None:
        """Gives the memory back, as soon as the last array in it is gone too."""
        self._map = None
        self._mapped = 0
        os.close(self.descriptor)
