"""Answers that were given before, kept for requests that are equal to the byte; bounded over all models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from hashlib import blake2b
from itertools import count

import numpy as np

from convoynet.server.types import Tensor

_ENTRY_BYTES = 512
"""What an answer takes beside its tensors, about."""


class ResponseCache:
    """The least recently used answers go first when `limit_bytes` are reached. Lives on the event loop; no locks.

    Attributes:
        nbytes: Bytes that the answers take now.
        evictions: Answers that went for others to have room.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.nbytes = 0
        self.evictions = 0
        self._limit = limit_bytes
        self._answers: OrderedDict[bytes, tuple[ModelCache, dict[str, Tensor], int]] = OrderedDict()
        self._serial = count()

    def __len__(self) -> int:
        """The number of answers."""
        return len(self._answers)

    def model(self, name: str, version: str) -> ModelCache:
        """A cache for one loaded version. Another for the same version, loaded again, shares no answer with it."""
        return ModelCache(self, f"{next(self._serial)}/{name}/{version}")

    def _get(self, key: bytes) -> dict[str, Tensor] | None:
        found = self._answers.get(key)
        if found is None:
            return None
        self._answers.move_to_end(key)
        return dict(found[1])

    def _put(self, owner: ModelCache, key: bytes, outputs: Mapping[str, Tensor]) -> None:
        size = _ENTRY_BYTES + sum(_size(tensor) for tensor in outputs.values())
        if size > self._limit:
            return
        self._remove(key)
        while self.nbytes + size > self._limit:
            self._remove(next(iter(self._answers)))
            self.evictions += 1
        self._answers[key] = (owner, {name: _frozen(tensor) for name, tensor in outputs.items()}, size)
        self.nbytes += size
        owner.keys.add(key)

    def _remove(self, key: bytes) -> None:
        found = self._answers.pop(key, None)
        if found is not None:
            owner, _, size = found
            self.nbytes -= size
            owner.keys.discard(key)


class ModelCache:
    """The answers of one loaded version of a model.

    Attributes:
        hits, misses: How often get() found an answer, and how often it did not.
        keys: Of the answers that are in the cache.
    """

    def __init__(self, cache: ResponseCache, identity: str) -> None:
        self.hits = 0
        self.misses = 0
        self.keys: set[bytes] = set()
        self._cache: ResponseCache | None = cache
        self._hash = blake2b(identity.encode(), digest_size=32)

    def key(self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()) -> bytes:
        """What an answer is found by: a BLAKE2b hash of the inputs, in any order, and of the outputs asked for.

        Takes one to two milliseconds for a megabyte of inputs. Names, types, shapes and lengths are all in it, so that
        different requests have different keys; nobody can make two that share one (Aumasson and others 2013).
        """
        state = self._hash.copy()
        state.update(repr(sorted(set(outputs))).encode())
        for name in sorted(inputs):
            tensor = inputs[name]
            state.update(repr((name, tensor.dtype.str, tensor.shape)).encode())
            if tensor.dtype == object:
                for element in tensor.ravel().tolist():
                    state.update(len(element).to_bytes(8, "little"))
                    state.update(element)
            else:
                state.update(np.ascontiguousarray(tensor).data)
        return state.digest()

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The outputs by name, read-only, or None."""
        found = self._cache._get(key) if self._cache is not None else None
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def put(self, key: bytes, outputs: Mapping[str, Tensor]) -> None:
        """Keeps a copy of an answer; does nothing after close(), nor where it is larger than the whole cache."""
        if self._cache is not None:
            self._cache._put(self, key, outputs)

    def close(self) -> None:
        """Drops every answer of this version, and takes none any more."""
        if self._cache is not None:
            for key in list(self.keys):
                self._cache._remove(key)
            self._cache = None


def _size(tensor: Tensor) -> int:
    return tensor.nbytes + (sum(map(len, tensor.ravel().tolist())) if tensor.dtype == object else 0)


def _frozen(tensor: Tensor) -> Tensor:
    """A copy that nobody can make writable again."""
    if tensor.dtype != object:
        return np.ndarray(tensor.shape, tensor.dtype, buffer=tensor.tobytes())
    copy = tensor.copy()
    copy.flags.writeable = False
    return copy.view()
