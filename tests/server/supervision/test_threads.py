"""Calls that hang: given up in time, bounded in number, and no burden for anybody else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from convoynet.server.supervision.threads import Overdue, Threads


async def test_results_and_errors_come_back() -> None:
    threads = Threads()
    assert await threads.run(60, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await threads.run(60, divmod, 7, 0)
    with pytest.raises(TimeoutError, match="own"):
        await threads.run(60, _raise, TimeoutError("own"))
    with pytest.raises(RuntimeError, match="StopIteration"):
        await threads.run(60, next, iter(()))


async def test_a_call_that_hangs_is_given_up_and_the_next_ones_go_on() -> None:
    threads, release = Threads(2), threading.Event()
    with pytest.raises(Overdue, match=r"no answer within 0\.05 s"):
        await threads.run(0.05, release.wait)
    assert await threads.run(60, len, "abc") == 3
    release.set()


async def test_as_many_calls_as_may_hang_and_no_more() -> None:
    threads, release = Threads(2), threading.Event()
    hanging = [asyncio.ensure_future(threads.run(0.05, release.wait)) for _ in range(2)]
    await asyncio.wait(hanging)
    assert all(isinstance(one.exception(), Overdue) for one in hanging)
    before = threading.active_count()
    with pytest.raises(Overdue):
        await threads.run(0.05, len, "abc")
    assert threading.active_count() == before
    release.set()
    assert await threads.run(60, len, "abc") == 3


def test_a_call_that_hangs_does_not_hold_up_the_end_of_the_process() -> None:
    code = """
import asyncio, threading
from convoynet.server.supervision.threads import Overdue, Threads
async def main():
    try:
        await Threads().run(0.05, threading.Event().wait)
    except Overdue as error:
        print(error.strerror)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "no answer within 0.05 s\n"


def _raise(error: Exception) -> None:
    raise error
