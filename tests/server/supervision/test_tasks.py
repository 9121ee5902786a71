"""Background tasks: their end is seen, and those that are to go on do."""

from __future__ import annotations

import ast
import asyncio
import socket
from itertools import pairwise
from pathlib import Path

import pytest

from convoynet.server.supervision import tasks
from tests.server import virtual_time

ROOT = Path(__file__).parents[3] / "server"


async def test_an_error_that_ends_a_task_is_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[BaseException] = []

    async def work() -> None:
        raise OSError("no descriptor")

    task = tasks.start(work(), "the watch", told.append)
    await asyncio.wait([task])
    await asyncio.sleep(0)
    assert [str(error) for error in told] == ["no descriptor"]
    assert "the watch ended with an error" in caplog.text


async def test_what_is_cancelled_or_returns_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    told: list[BaseException] = []
    forever = tasks.start(asyncio.sleep(1e6), "a", told.append)
    short = tasks.start(asyncio.sleep(0), "b", told.append)
    forever.cancel()
    await asyncio.wait([forever, short])
    await asyncio.sleep(0)
    assert not told
    assert not caplog.records


def test_what_is_kept_goes_on_after_growing_pauses() -> None:
    async def run() -> list[float]:
        loop = asyncio.get_running_loop()
        begun: list[float] = []

        async def work() -> None:
            begun.append(loop.time())
            if len(begun) < 12:
                raise MemoryError

        await tasks.keep(work, "the watch")
        return [later - earlier for earlier, later in pairwise(begun)]

    pauses = virtual_time.run(run(), virtual_time.VirtualTimeLoop())
    assert pauses[:3] == pytest.approx([0.1, 0.2, 0.4])
    assert max(pauses) == pytest.approx(30.0)


def test_pauses_grow_to_a_bound_and_begin_anew() -> None:
    pauses = tasks.Pauses(1.0, 5.0)
    assert [pauses.next() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    pauses.reset()
    assert pauses.next() == 1.0


def test_nobody_starts_a_task_and_forgets_it() -> None:
    """A call whose task is thrown away: the loop keeps it not alive, and nobody sees its end."""
    forgotten = []
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                name = getattr(node.value.func, "attr", "")
                owner = getattr(getattr(node.value.func, "value", None), "id", "")
                if name in ("create_task", "ensure_future") and owner != "group":
                    forgotten.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not forgotten


async def test_works_together_end_before_the_error_of_one_is_told() -> None:
    """What one of them waits for may be closed then."""
    mine, other = socket.socketpair()
    mine.setblocking(False)
    loop = asyncio.get_running_loop()

    async def fails() -> None:
        await asyncio.sleep(0)
        raise OSError("it has died")

    with mine, other, pytest.raises(OSError, match="it has died"):
        await tasks.together(loop.sock_recv(mine, 1), fails())
    assert await tasks.together(asyncio.sleep(0, "a"), asyncio.sleep(0, "b")) == ["a", "b"]
    assert await tasks.together() == []
