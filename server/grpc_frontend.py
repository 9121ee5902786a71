"""The gRPC methods: raw bytes in, raw bytes out; what they mean is the dispatcher's."""

from __future__ import annotations

import time
from typing import Any

import grpc
from grpc import aio

from server.dispatch import SERVICE, Dispatcher
from server.tls import identity_from_auth
from server.types import Call


def handler(dispatcher: Dispatcher, management: bool = True) -> grpc.GenericRpcHandler:
    """Every RPC of the service; `management` is whether the listener takes management calls."""
    methods = {
        rpc.name: _method(rpc.name, dispatcher, management) for rpc in SERVICE.methods if not rpc.server_streaming
    }
    return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)


def _method(rpc: str, dispatcher: Dispatcher, management: bool) -> grpc.RpcMethodHandler:
    async def answer(payload: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        call = Call(
            "grpc",
            deadline,
            context.invocation_metadata() or (),
            identity=identity_from_auth(context.auth_context()),
            management=management,
        )
        reply = await dispatcher.unary(rpc, payload, call)
        if reply.code is not grpc.StatusCode.OK:
            await context.abort(reply.code, reply.message, reply.trailers)
        return reply.payload

    return grpc.unary_unary_rpc_method_handler(answer)
