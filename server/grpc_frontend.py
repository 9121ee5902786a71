"""The gRPC methods: raw bytes in, raw bytes out; what they mean is the dispatcher's."""

from __future__ import annotations

import time
from typing import Any

import grpc
from grpc import aio

from server.dispatch import SERVICE
from server.frontend.session import Answers
from server.types import Call


def handler(answers: Answers) -> grpc.GenericRpcHandler:
    """Every RPC of the service."""
    methods = {rpc.name: _method(rpc.name, answers) for rpc in SERVICE.methods if not rpc.server_streaming}
    return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)


def _method(rpc: str, answers: Answers) -> grpc.RpcMethodHandler:
    async def answer(payload: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        reply = await answers.unary(rpc, payload, Call("grpc", deadline, context.invocation_metadata() or ()))
        if reply.code is not grpc.StatusCode.OK:
            await context.abort(reply.code, reply.message, reply.trailers)
        return reply.payload

    return grpc.unary_unary_rpc_method_handler(answer)
