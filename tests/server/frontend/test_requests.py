"""Reading the requests of gRPC: a few large ones at a time, none that there is no room for, none at the end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc import aio

from convoynet.server.errors import DeadlineExceeded, Draining, OverBudget
from convoynet.server.frontend import requests
from convoynet.server.frontend.requests import Requests
from convoynet.server.memory.budget import SLACK_BYTES, Budget


class Client:
    """A call's context whose message comes when the test says so."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.message: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def read(self) -> Any:
        """See aio.ServicerContext."""
        self.asked.set()
        return await self.message


async def turns() -> None:
    """Lets everything happen that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_large_requests_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_TURN_SECONDS", 3600.0)
    monkeypatch.setattr(requests, "_LONGEST_SECONDS", 3600.0)
    reading, clients = Requests(Budget()), [Client() for _ in range(20)]
    tasks = [asyncio.ensure_future(reading.one(client)) for client in clients]  # type: ignore[arg-type]
    await turns()
    assert [client.asked.is_set() for client in clients] == [True] * 8 + [False] * 12
    clients[0].message.set_result(bytes(16 * 2**20))  # so large: two at a time
    await turns()
    assert sum(client.asked.is_set() for client in clients) == 8
    for client in clients[1:7]:
        client.message.set_result(b"")
    await turns()
    assert sum(client.asked.is_set() for client in clients) > 8
    for client in clients[7:]:
        client.message.set_result(aio.EOF)
    assert [len(payload or b"") for payload in await asyncio.gather(*tasks)] == [16 * 2**20, *([0] * 19)]
    assert await asyncio.gather(*tasks[-1:]) == [None]


async def test_with_a_small_budget_fewer_are_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_TURN_SECONDS", 3600.0)
    monkeypatch.setattr(requests, "_LONGEST_SECONDS", 3600.0)
    reading, clients = Requests(Budget(8 * 2**20)), [Client() for _ in range(20)]
    tasks = [asyncio.ensure_future(reading.one(client)) for client in clients]  # type: ignore[arg-type]
    await turns()
    assert sum(client.asked.is_set() for client in clients) == 8
    for client in clients[:8]:
        client.message.set_result(bytes(2**20))
    await turns()
    assert sum(client.asked.is_set() for client in clients) == 12  # half of it: four more
    for client in clients[8:]:
        client.message.set_result(aio.EOF)
    await asyncio.gather(*tasks)


async def test_small_requests_are_read_all_at_once() -> None:
    reading = Requests(Budget())
    for _ in range(200):
        (client := Client()).message.set_result(b"small")
        assert await reading.one(client) == b"small"  # type: ignore[arg-type]
    clients = [Client() for _ in range(1000)]
    tasks = [asyncio.ensure_future(reading.one(client)) for client in clients]  # type: ignore[arg-type]
    await turns()
    assert all(client.asked.is_set() for client in clients)
    for task in tasks:
        task.cancel()


async def test_slow_clients_do_not_hold_up_others_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_TURN_SECONDS", 0.01)
    reading, clients = Requests(Budget()), [Client() for _ in range(20)]
    tasks = [asyncio.ensure_future(reading.one(client)) for client in clients]  # type: ignore[arg-type]
    await asyncio.gather(*(client.asked.wait() for client in clients))
    for task in tasks:
        task.cancel()


async def test_what_is_being_read_ends_where_the_process_grows_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_LOOK_SECONDS", 0.001)
    resident = 0
    budget = Budget(100, resident=lambda: resident)
    reading, client, stream = Requests(budget), Client(), Client()
    task = asyncio.ensure_future(reading.one(client))  # type: ignore[arg-type]
    following = asyncio.ensure_future(anext(reading.stream(stream)))  # type: ignore[arg-type]
    await asyncio.gather(client.asked.wait(), stream.asked.wait())
    resident = 200 + SLACK_BYTES
    for ended in (task, following):
        with pytest.raises(OverBudget):
            await ended
    assert budget.reading == 0
    # Nothing is read any more: what is left after a while is no request's.
    budget._looked, budget._read = 0.0, budget._read - 1.0
    (again := Client()).message.set_result(b"x")
    assert await reading.one(again) == b"x"  # type: ignore[arg-type]


async def test_the_request_of_a_call_comes_whole_or_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WHOLE_SECONDS", "_LOOK_SECONDS", "_SWEEP_SECONDS"):
        monkeypatch.setattr(requests, name, 0.001)
    reading, stream = Requests(Budget()), Client()
    following = asyncio.ensure_future(anext(reading.stream(stream)))  # type: ignore[arg-type]
    with pytest.raises(DeadlineExceeded, match=r"did not come whole within 0\.001 s"):
        await reading.one(Client())  # type: ignore[arg-type]
    stream.message.set_result(b"a stream's may be waited for")
    assert await following == b"a stream's may be waited for"


async def test_the_end_is_the_end_of_every_read() -> None:
    reading, client, stream = Requests(Budget()), Client(), Client()
    task = asyncio.ensure_future(reading.one(client))  # type: ignore[arg-type]

    async def all_of(context: Client) -> list[bytes]:
        return [payload async for payload in reading.stream(context)]  # type: ignore[arg-type]

    following = asyncio.ensure_future(all_of(stream))
    await asyncio.gather(client.asked.wait(), stream.asked.wait())
    reading.end()
    with pytest.raises(Draining):
        await task
    assert await following == []
    with pytest.raises(Draining):
        await reading.one(Client())  # type: ignore[arg-type]


async def test_a_call_that_is_cancelled_is_cancelled() -> None:
    reading, client = Requests(Budget()), Client()
    task = asyncio.ensure_future(reading.one(client))  # type: ignore[arg-type]
    await client.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
