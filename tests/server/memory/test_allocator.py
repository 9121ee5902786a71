"""What glibc's allocator is told."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SMALL = """
import threading
from convoynet.server.memory.allocator import keep_large_pieces_apart
from convoynet.server.memory.budget import resident_bytes

keep_large_pieces_apart(8 * 2**20)
before = resident_bytes()
freed, done, left = threading.Event(), threading.Event(), []

def work():
    pieces = [bytearray(b"x" * 100_000) for _ in range(250)]
    left.append(resident_bytes() - before)
    pieces.clear()
    freed.set()
    done.wait()

threading.Thread(target=work).start()
freed.wait()
left.append(resident_bytes() - before)
done.set()
assert left[0] > 20_000_000, left
assert left[1] < 5_000_000, left
"""
GROWN = """
from convoynet.server.memory.allocator import give_free_memory_back, keep_large_pieces_apart
from convoynet.server.memory.budget import resident_bytes

keep_large_pieces_apart(2**40)
del (first := [bytearray(20_000_000)])[0]  # from which glibc would learn
before = resident_bytes()
pieces = [bytearray(b"x" * 5_000_000) for _ in range(20)]
held = resident_bytes() - before
last = bytearray(b"x" * 5_000_000)
pieces.clear()
assert held > 90_000_000, held
left = resident_bytes() - before - len(last)
assert left < 20_000_000, left
small = [bytearray(100_000) for _ in range(1000)]
last = bytearray(100_000)
small.clear()
give_free_memory_back()
assert resident_bytes() - before < 20_000_000
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_large_pieces_go_back_when_they_are_freed_and_others_when_that_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", GROWN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_with_a_small_budget_little_is_kept_in_the_heap_of_any_thread() -> None:
    done = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
