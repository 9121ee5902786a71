"""The two stacks that can end gRPC's HTTP/2 answer alike, with one front end or several."""

from __future__ import annotations

import asyncio
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.app import App
from tests.server.conftest import Running, Serving, code_of, config, fake_model, infer_request, sums
from tests.server.protocol.test_counting import wide_model
from tests.server.raw_http2 import DATA, HEADERS, RawClient

ANY = health_pb2.HealthCheckRequest()
STACKS = pytest.mark.parametrize("stack", ["grpcio", "native"])


async def answers(running: Any) -> list[Any]:
    """What a client sees of calls of every kind, good and bad."""
    stub, channel = running.stub, running.channel
    good = [sums(a) for a in await asyncio.gather(*(stub.ModelInfer(infer_request(i, 2 * i)) for i in range(20)))]
    bad = [
        await code_of(stub.ModelInfer(infer_request(1, model="absent"))),
        await code_of(stub.ModelInfer(infer_request(*range(9)))),
        await code_of(channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff")),
        await code_of(channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b""))
        == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!"),
        (await code_of(stub.ModelInfer(infer_request(1, model="m" * 20000))))[0],
    ]
    requests = [infer_request(1), infer_request(2, model="absent"), infer_request(3)]
    streamed = [r async for r in stub.ModelStreamInfer(iter(requests))]
    health = health_pb2_grpc.HealthStub(channel)
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    named = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    services = [service.name async for r in named for service in r.list_services_response.service]
    status = (await health.Check(ANY)).status, await code_of(health.Check(health_pb2.HealthCheckRequest(service="no")))
    metadata = (await stub.ModelMetadata(pb.ModelMetadataRequest(name="sum"))).SerializeToString()
    return [good, bad, [r.SerializeToString() for r in streamed], services, status, metadata]


async def test_both_stacks_answer_alike_with_one_front_end_or_two(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving(grpc_stack="grpcio") as running:
        expected = await answers(running)
    assert expected[0] == [[i, 2 * i] for i in range(20)]
    assert len(expected[2]) == 3
    for frontends in ("1", "2"):
        async with serving(grpc_stack="native", frontends=frontends) as running:
            assert await answers(running) == expected


@STACKS
async def test_deadlines_cancellation_and_a_full_queue(serving: Serving, tmp_path: Path, stack: str) -> None:
    fake_model(tmp_path, config="max_batch_size: 1\ndynamic_batching { }\n")

    def rejected(reason: str) -> float:
        value: float = running.metric("convoy_rejected_total", model="sum", version="1", reason=reason)
        return value

    async with serving(grpc_stack=stack, max_queue=3) as running:
        with running.held():
            late = await running.late(lambda seconds: running.stub.ModelInfer(infer_request(2), timeout=seconds))
            assert late is grpc.StatusCode.DEADLINE_EXCEEDED
            first = asyncio.ensure_future(running.stub.ModelInfer(infer_request(1)))
            await running.until(lambda model: model.inflight == 1)
            gone = running.stub.ModelInfer(infer_request(3))
            await running.until(lambda model: model.inflight == 2)
            gone.cancel()
            await running.until(lambda model: model.inflight == 1)
        assert sums(await first) == [1]
        assert (rejected("deadline"), rejected("cancelled")) == (1, 1)
        with running.held():
            calls = [running.stub.ModelInfer(infer_request(i)) for i in range(8)]
            while not rejected("queue_full"):
                await asyncio.sleep(0.002)
        codes = [(await code_of(call))[0] for call in calls]
        refused = [call for call, code in zip(calls, codes, strict=True) if code is grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert refused
        assert codes.count(grpc.StatusCode.OK) == 8 - len(refused)
        assert {"grpc-retry-pushback-ms" in dict(await call.trailing_metadata()) for call in refused} == {True}


@STACKS
async def test_messages_above_the_limit_are_refused(serving: Serving, tmp_path: Path, stack: str) -> None:
    fake_model(tmp_path)
    async with serving(grpc_stack=stack, max_message_bytes=2000) as running:
        code, _ = await code_of(running.stub.ModelInfer(infer_request(1, model="m" * 3000)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert sums(await running.stub.ModelInfer(infer_request(1))) == [1]


@STACKS
async def test_a_drain_answers_what_was_accepted_and_tells_those_who_watch(tmp_path: Path, stack: str) -> None:
    fake_model(tmp_path, config="max_batch_size: 1\ndynamic_batching { }\n")
    app = App(config(tmp_path, grpc_stack=stack, drain_seconds=0.2))
    await app.start()
    watched: list[int] = []
    async with aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel:

        async def watch() -> None:
            call = health_pb2_grpc.HealthStub(channel).Watch(ANY)
            async for change in call:
                watched.append(change.status)
                if change.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                    call.cancel()
                    return

        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        watching = asyncio.ensure_future(watch())
        with Running(app, None, channel).held():
            asked = [infer(infer_request(i)) for i in range(4)]
            while not watched or app.core.model("sum").inflight < 4:
                await asyncio.sleep(0.005)
            stopped = asyncio.ensure_future(app.stop())
            await watching
        assert await stopped
        assert [sums(await call) for call in asked] == [[0], [1], [2], [3]]
        await watching
    assert watched == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]


@STACKS
async def test_a_drain_waits_for_answers_that_are_being_read(tmp_path: Path, stack: str) -> None:
    wide_model(tmp_path, 500_000)
    app = App(config(tmp_path, grpc_stack=stack, drain_seconds=0.0, drain_timeout_seconds=3600.0))
    await app.start()
    payload = infer_request(1, model="wide").SerializeToString()
    slow = [await RawClient.connect(app.grpc_port) for _ in range(2)]
    for client in slow:
        client.call("ModelInfer", struct.pack(">BI", 0, len(payload)) + payload, end=True)
        assert await client.until(DATA)
    stopped = asyncio.ensure_future(app.stop())
    async with aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        while (await code_of(infer(payload, timeout=60)))[0] is grpc.StatusCode.OK:
            await asyncio.sleep(0.01)
    for client in slow:
        client.allow(2**24)
        assert await client.until(HEADERS, 1), "the connection has ended within an answer"
        client.close()
    assert await stopped


@STACKS
async def test_a_refusal_says_why_whatever_it_quotes(serving: Serving, tmp_path: Path, stack: str) -> None:
    fake_model(tmp_path)
    async with serving(grpc_stack=stack) as running:
        for letter in ("a", "%", "\u00e9", "\u20ac", "\U0001f600"):
            code, text = await code_of(running.stub.ModelInfer(infer_request(1, model=letter * 3000)))
            assert code is grpc.StatusCode.NOT_FOUND
            assert text.startswith(f"Request for unknown model: '{letter}")
            wrong = infer_request(1, priority=-1)
            wrong.id = letter * 3000
            code, text = await code_of(running.stub.ModelInfer(wrong))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert text.endswith("invalid value for 'priority', expected value >= 0.")


@STACKS
@pytest.mark.parametrize("frontends", ["1", "2"])
async def test_a_stream_ends_with_why_its_next_message_cannot_be_taken(
    serving: Serving, tmp_path: Path, stack: str, frontends: str
) -> None:
    fake_model(tmp_path)
    too_large = infer_request(1)
    too_large.id = "i" * 10_000
    async with serving(grpc_stack=stack, frontends=frontends, max_message_bytes=5000) as running:
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate):
            stream = running.stub.ModelStreamInfer(compression=compression)
            await stream.write(infer_request(2))
            assert sums((await stream.read()).infer_response) == [2]
            with suppress(aio.AioRpcError):
                await stream.write(too_large)
                await stream.read()
            assert await stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, compression
