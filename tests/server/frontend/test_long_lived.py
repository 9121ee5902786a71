"""Connections and streams that stay: pings, and what the end of the server does to what has nothing due."""

from __future__ import annotations

import asyncio
import re
import struct
from pathlib import Path

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from convoynet.protos.inference import grpc_service_pb2_grpc
from convoynet.server.app import App
from convoynet.server.config import ServeConfig
from tests.server.conftest import Serving, config, fake_model, infer_request, sums
from tests.server.raw_http2 import DATA, GOAWAY, NEVER, PING, RawClient

STACKS = pytest.mark.parametrize(
    ("stack", "frontends"),
    [(stack, count) for stack in ("native", "grpcio") for count in ("1", "2")],
)
ENVOY = Path(__file__).parents[3] / "deploy" / "load-balancing" / "envoy.yaml"


@STACKS
@pytest.mark.parametrize("with_a_call", [True, False])
async def test_pings_that_are_far_enough_apart_are_answered(
    serving: Serving, tmp_path: Path, stack: str, frontends: str, with_a_call: bool
) -> None:
    fake_model(tmp_path)
    interval = {"grpc_http2_min_recv_ping_interval_without_data": 1}
    async with serving(grpc_stack=stack, frontends=frontends, **interval) as running:
        client = await RawClient.connect(running.app.grpc_port)
        if with_a_call:
            client.call("ModelStreamInfer")
        for _ in range(12):
            client.ping()
            assert await client.until(PING, 1) == b"12345678"
            await asyncio.sleep(0.01)
        client.close()


@pytest.mark.parametrize("stack", ["native", "grpcio"])
@pytest.mark.parametrize(("strikes", "ended"), [(2, True), (0, False)])
async def test_pings_that_are_not_end_a_connection_where_strikes_are_counted(
    serving: Serving, tmp_path: Path, stack: str, strikes: int, ended: bool
) -> None:
    fake_model(tmp_path)
    settings = {"grpc_http2_max_ping_strikes": strikes, "grpc_http2_min_recv_ping_interval_without_data": 10**6}
    async with serving(grpc_stack=stack, frontends="1", **settings) as running:
        client = await RawClient.connect(running.app.grpc_port)
        answers = []
        for _ in range(12):
            client.ping()
            answers.append(await client.until(PING, 1))
        assert any(b"too_many_pings" in answer for answer in answers) is ended
        assert (answers == [b"12345678"] * 12) is not ended
        client.close()


def test_public_clients_and_our_own_proxy_live_with_the_defaults(tmp_path: Path) -> None:
    settings = ServeConfig((str(tmp_path),), threads=1)
    shortest = 10_000  # gRPC's clients ping no more often, whatever they are told
    envoy = re.search(r"connection_keepalive: \{interval: ([0-9]+)s", ENVOY.read_text())
    assert envoy is not None
    assert settings.grpc_http2_min_recv_ping_interval_without_data < min(shortest, int(envoy[1]) * 1000)
    assert settings.grpc_keepalive_permit_without_calls


@pytest.mark.parametrize("stack", ["native", "grpcio"])
async def test_a_connection_is_asked_to_end_at_its_age(serving: Serving, tmp_path: Path, stack: str) -> None:
    fake_model(tmp_path)
    async with serving(
        grpc_stack=stack, frontends="1", grpc_max_connection_age=50, grpc_max_connection_age_grace=50
    ) as running:
        client = await RawClient.connect(running.app.grpc_port)
        assert await client.until(GOAWAY)
        client.close()


async def test_the_age_of_a_connection_ends_what_takes_no_answer(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    config = tmp_path / "sum" / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [1]", "dims: [500000]"))
    ages = {"grpc_max_connection_age": 500, "grpc_max_connection_age_grace": 100}
    payload = infer_request(1).SerializeToString()
    async with serving(frontends="1", **ages) as running:
        client = await RawClient.connect(running.app.grpc_port)
        client.call("ModelInfer", struct.pack(">BI", 0, len(payload)) + payload, end=True)
        assert await client.until(DATA)
        while running.app._budget.held:
            await asyncio.sleep(0.01)
        client.close()


@STACKS
async def test_the_end_waits_for_nothing_that_is_not_due(tmp_path: Path, stack: str, frontends: str) -> None:
    """The drain may take an hour: the server ends before."""
    fake_model(tmp_path, seconds=0.2)
    app = App(config(tmp_path, grpc_stack=stack, frontends=frontends, drain_timeout_seconds=3600.0))
    await app.start()
    half = await RawClient.connect(app.grpc_port)
    half.call("ModelInfer", b"\0\0\0\x01\0" + b"x" * 10)
    # As a client does that is there: for one that answers no ping, gRPC's end waits 20 s.
    answering = asyncio.create_task(half.until(NEVER))
    async with aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        unused = stub.ModelStreamInfer()
        idle = stub.ModelStreamInfer()
        await idle.write(infer_request(1))
        assert sums((await idle.read()).infer_response) == [1]
        due = stub.ModelStreamInfer()
        reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await reflected.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await reflected.read()
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watched.read()
        await due.write(infer_request(2))
        while not app.core.model("sum").inflight:
            await asyncio.sleep(0.002)
        assert await app.stop()
        assert sums((await due.read()).infer_response) == [2]
        for stream in (unused, idle, due):
            with pytest.raises(aio.AioRpcError):
                await stream.read()
            assert await stream.code() is grpc.StatusCode.UNAVAILABLE
    half.close()
    await answering
