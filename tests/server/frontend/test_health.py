"""grpc.health.v1, as those see it who watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convoynet.server.config import ServeConfig
from convoynet.server.frontend.local import NOT_SERVING, SERVING, LocalFrontEnd, Manner
from tests.server.conftest import code_of


@pytest.fixture
async def watched() -> AsyncIterator[tuple[LocalFrontEnd, Any]]:
    """A gRPC server, and a stub of its health."""
    front = LocalFrontEnd(None, Manner())  # type: ignore[arg-type]  # nothing is asked of the models
    port = await front.start(ServeConfig.host, 0)
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield front, health_pb2_grpc.HealthStub(channel)
    await front.stop(0)


async def test_one_watcher_that_leaves_takes_no_other_along(watched: tuple[LocalFrontEnd, Any]) -> None:
    front, stub = watched
    stays, leaves = (stub.Watch(health_pb2.HealthCheckRequest(service="m")) for _ in range(2))
    for stream in (stays, leaves):
        assert (await stream.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    leaves.cancel()
    await front.set("m", SERVING)
    assert (await stays.read()).status == SERVING
    await front.not_serving()
    await front.set("m", SERVING)
    assert (await stays.read()).status == NOT_SERVING
    stays.cancel()


async def test_a_watcher_does_not_hold_up_the_end(watched: tuple[LocalFrontEnd, Any]) -> None:
    front, stub = watched
    stream = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await stream.read()).status == SERVING
    stopping = asyncio.ensure_future(front.stop(200))
    assert await code_of(stream.read()) == (grpc.StatusCode.UNAVAILABLE, "the server is stopping")
    await stopping


async def test_check_of_what_nobody_has_set(watched: tuple[LocalFrontEnd, Any]) -> None:
    code, _ = await code_of(watched[1].Check(health_pb2.HealthCheckRequest(service="m")))
    assert code is grpc.StatusCode.NOT_FOUND
