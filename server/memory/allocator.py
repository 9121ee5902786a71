"""How glibc's allocator keeps the memory of this process; nothing where it is another."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 4 * 2**20
_KEPT = 32 * 2**20
_LEAST = 128 * 2**10


def give_free_memory_back() -> None:
    """To the system, what the allocator keeps for later."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_large_pieces_apart(limit: int) -> None:
    """Large pieces have pages of their own, which go back to the system when they are freed.

    Left alone glibc learns from the first large piece that is freed to take up to 32 MiB from its heaps. Requests and
    answers of that size then leave holes there, and a process takes twice what it holds. Of the rest it keeps up to
    32 MiB at the end of every thread's heap, which give_free_memory_back() does not reach, so that messages of ordinary
    size fault no pages in. MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the environment win.

    Args:
        limit: Bytes that are held for callers at most. Large is what has 4 MiB, or an eighth of that; no more than that
            eighth is kept, either.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for name, parameter, value in (
            ("MALLOC_MMAP_THRESHOLD_", _MMAP_THRESHOLD, max(_LEAST, min(_LARGE, limit // 8))),
            ("MALLOC_TRIM_THRESHOLD_", _TRIM_THRESHOLD, max(_LEAST, min(_KEPT, limit // 8))),
        ):
            if name not in os.environ:
                libc.mallopt(parameter, value)
