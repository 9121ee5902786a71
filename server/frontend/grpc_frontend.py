"""The gRPC methods: raw bytes in, raw bytes out; what they mean is the dispatcher's."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from grpc import aio

from convoynet.server.frontend.session import Answers
from convoynet.server.protocol.dispatch import SERVICE
from convoynet.server.security.tls import identity_from_auth
from convoynet.server.types import Call

_NO_DEADLINE = 10.0**9


def methods(answers: Answers, management: bool = True, *, push_back: bool = True) -> dict[str, grpc.RpcMethodHandler]:
    """Every RPC of the service by name.

    Args:
        answers: Where the calls go.
        management: Whether the listener takes management calls.
        push_back: Whether the stack can send trailers whose names begin with `grpc-`: how long a retry is to wait.
    """
    return {
        rpc.name: _stream_method(rpc.name, answers, management)
        if rpc.server_streaming
        else _method(rpc.name, answers, management, push_back)
        for rpc in SERVICE.methods
    }


def _method(rpc: str, answers: Answers, management: bool, push_back: bool) -> grpc.RpcMethodHandler:
    async def answer(payload: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        reply = await answers.unary(rpc, payload, _call(context, management))
        if reply.code is not grpc.StatusCode.OK:
            trailers = reply.trailers if push_back else ()
            await context.abort(reply.code, reply.message, trailers)
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
    # grpcio's asyncio server has None for no deadline, the native stack some ages.
    deadline = None if remaining is None or remaining > _NO_DEADLINE else time.monotonic() + remaining
    identity = identity_from_auth(context.auth_context())
    return Call("grpc", deadline, context.invocation_metadata() or (), identity=identity, management=management)
