"""The gRPC methods: raw bytes in, raw bytes out; what they mean is the dispatcher's."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from grpc import aio

from server.dispatch import SERVICE
from server.frontend.session import Answers
from server.tls import identity_from_auth
from server.types import Call


def handler(answers: Answers, management: bool = True) -> grpc.GenericRpcHandler:
    """Every RPC of the service; `management` is whether the listener takes management calls."""
    methods = {
        rpc.name: (_stream_method if rpc.server_streaming else _method)(rpc.name, answers, management)
        for rpc in SERVICE.methods
    }
    return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)


def _method(rpc: str, answers: Answers, management: bool) -> grpc.RpcMethodHandler:
    async def answer(payload: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        reply = await answers.unary(rpc, payload, _call(context, management))
        if reply.code is not grpc.StatusCode.OK:
            await context.abort(reply.code, reply.message, reply.trailers)
        return reply.payload

    return grpc.unary_unary_rpc_method_handler(answer)


def _stream_method(rpc: str, answers: Answers, management: bool) -> grpc.RpcMethodHandler:
    async def answer(payloads: AsyncIterator[bytes], context: aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        async with aclosing(answers.stream(rpc, payloads, _call(context, management))) as replies:
            async for reply in replies:
                if reply.code is not grpc.StatusCode.OK:
                    await context.abort(reply.code, reply.message, reply.trailers)
                yield reply.payload

    return grpc.stream_stream_rpc_method_handler(answer)


def _call(context: aio.ServicerContext[Any, Any], management: bool) -> Call:
    remaining = context.time_remaining()
    deadline = None if remaining is None else time.monotonic() + remaining
    identity = identity_from_auth(context.auth_context())
    return Call("grpc", deadline, context.invocation_metadata() or (), identity=identity, management=management)
