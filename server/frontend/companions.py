"""The services beside the protocol's own, health and reflection: for everybody, so their requests have to be small."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc import aio
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from convoynet.server.errors import Draining, ServerError
from convoynet.server.frontend.health import Health
from convoynet.server.frontend.requests import Reading
from convoynet.server.protocol.dispatch import SERVICE
from convoynet.server.status import code_of

MOST_BYTES = 4096
"""The largest request to these services."""

_Context: TypeAlias = aio.ServicerContext[Any, Any]


def handlers(watched: Health, requests: Reading) -> dict[str, dict[str, grpc.RpcMethodHandler]]:
    """The methods of both services, by service."""
    names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflected = reflection.aio.ReflectionServicer(names)

    async def check(_: object, context: _Context) -> bytes:
        request = await _one(requests, context, health_pb2.HealthCheckRequest)
        return bytes((await watched.Check(request, context)).SerializeToString())

    async def watch(_: object, context: _Context) -> AsyncIterator[bytes]:
        request = await _one(requests, context, health_pb2.HealthCheckRequest)
        async for status in watched.Watch(request, context):
            yield status.SerializeToString()

    async def reflect(_: object, context: _Context) -> AsyncIterator[bytes]:
        async def asked() -> AsyncIterator[Any]:
            async for payload in requests.stream(context):
                yield await _parsed(payload, context, reflection_pb2.ServerReflectionRequest)

        try:
            async for answer in reflected.ServerReflectionInfo(asked(), context):
                yield answer.SerializeToString()
        except ServerError as error:
            await _end(context, code_of(error), str(error))
        if requests.ended:
            await _end(context, code_of(Draining()), "the server is stopping")

    of_health = {
        "Check": grpc.stream_unary_rpc_method_handler(check),
        "Watch": grpc.stream_stream_rpc_method_handler(watch),
    }
    of_reflection = {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(reflect)}
    return {health.SERVICE_NAME: of_health, reflection.SERVICE_NAME: of_reflection}


async def _one(requests: Reading, context: _Context, kind: Any) -> Any:
    try:
        payload = await requests.one(context)
    except ServerError as error:
        await _end(context, code_of(error), str(error))
    if payload is None:
        await _end(context, grpc.StatusCode.UNIMPLEMENTED, "the call takes one request, got none")
    return await _parsed(payload, context, kind)


async def _parsed(payload: bytes, context: _Context, kind: Any) -> Any:
    name = kind.DESCRIPTOR.name
    if len(payload) > MOST_BYTES:
        text = f"a {name} may have {MOST_BYTES} bytes, got {len(payload)}"
        await _end(context, grpc.StatusCode.INVALID_ARGUMENT, text)
    try:
        return kind.FromString(payload)
    except DecodeError:
        await _end(context, grpc.StatusCode.INVALID_ARGUMENT, f"the payload is not a {name}")


async def _end(context: _Context, code: grpc.StatusCode, text: str) -> NoReturn:
    await context.abort(code, text)
    raise AssertionError("abort() raises")
