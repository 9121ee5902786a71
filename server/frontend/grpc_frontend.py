"""The gRPC methods: raw bytes in, raw bytes out; what they mean is the dispatcher's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from grpc import aio

from convoynet.server.errors import Draining, OverBudget, Oversize, ServerError
from convoynet.server.frontend.requests import Reading
from convoynet.server.frontend.session import Answers
from convoynet.server.memory.budget import SMALL_BYTES, Budget
from convoynet.server.protocol.dispatch import SERVICE
from convoynet.server.security.tls import identity_from_auth
from convoynet.server.types import Call

_REFUSED_SECONDS = 0.05
"""How long gRPC may take to end a call whose request it has refused."""


def methods(
    answers: Answers,
    requests: Reading,
    budget: Budget,
    management: bool = True,
    *,
    certified: bool = False,
) -> dict[str, grpc.RpcMethodHandler]:
    """Every RPC of the service by name.

    Args:
        answers: Where the calls go.
        requests: Reads the requests.
        budget: What answers count for while their clients take them.
        management: Whether the listener takes management calls.
        certified: Whether clients may have certificates.
    """
    front = _Methods(answers, requests, budget, management, certified)
    return {
        rpc.name: front.stream(rpc.name) if rpc.server_streaming else front.unary(rpc.name) for rpc in SERVICE.methods
    }


def unknown(answers: Answers) -> grpc.RpcMethodHandler:
    """Refuses calls of methods that there are not as gRPC does, of however many requests they are, and counts them."""

    async def refuse(_: object, context: aio.ServicerContext[Any, Any]) -> None:
        answers.over("", Call("grpc", code="UNIMPLEMENTED"))
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    return grpc.stream_unary_rpc_method_handler(refuse)


@dataclass(frozen=True)
class _Methods:
    answers: Answers
    requests: Reading
    budget: Budget
    management: bool
    certified: bool

    def unary(self, rpc: str) -> grpc.RpcMethodHandler:
        """A call of one request is a stream of it: so the call can be judged before the request is read."""

        async def answer(_: object, context: aio.ServicerContext[Any, Any]) -> bytes:
            call = self._call(context)
            try:
                reply = self.answers.refused(rpc, call)
                if reply is None:
                    try:
                        payload = await self.requests.one(context)
                    except ServerError as error:
                        await self._refuse(error, rpc, call, context)
                    if payload is None:
                        await self._nothing_came(rpc, call, context)
                    call.arrived = time.perf_counter_ns()
                    reply = await self.answers.unary(rpc, payload, call)
                    # What abort() raises keeps this frame until the collector of garbage comes.
                    del payload
                if (full := self._no_room(len(reply.payload), context)) is not None:
                    reply = self.answers.refusal(full)  # in the place of the answer
                    call.error, call.code = full, reply.code.name
                if reply.code is not grpc.StatusCode.OK:
                    self.answers.over(rpc, call)
                    await context.abort(reply.code, reply.message, reply.trailers)
                return reply.payload
            finally:
                self.answers.over(rpc, call)

        return grpc.stream_unary_rpc_method_handler(answer)

    def stream(self, rpc: str) -> grpc.RpcMethodHandler:
        async def answer(_: object, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
            payloads, call = self.requests.stream(context), self._call(context)
            try:
                async with aclosing(self.answers.stream(rpc, payloads, call)) as replies:
                    async for reply in replies:
                        if reply.code is not grpc.StatusCode.OK:
                            await context.abort(reply.code, reply.message, reply.trailers)
                        yield reply.payload
            except ServerError as error:  # of one more request: there is no room for it, or it is none
                await self._refuse(error, "ModelInfer", call, context)
            if self.requests.ended:
                reply = self.answers.refusal(Draining())
                await context.abort(reply.code, reply.message)

        return grpc.stream_stream_rpc_method_handler(answer)

    def _no_room(self, size: int, context: aio.ServicerContext[Any, Any]) -> OverBudget | None:
        """Counts an answer until its client has taken it, however slowly; what stands against that."""
        if size >= SMALL_BYTES:
            try:
                self.budget.take(size)
            except OverBudget as error:
                return error
            context.add_done_callback(lambda _: self.budget.give(size))
        return None

    async def _nothing_came(self, rpc: str, call: Call, context: aio.ServicerContext[Any, Any]) -> NoReturn:
        """The client sent no request, or one that gRPC itself has refused for its size: then this is cancelled.

        So it is where the client goes before all of its request has come, which looks the same but for its deadline.
        """
        call.error, call.code = Oversize("its message is too large"), "RESOURCE_EXHAUSTED"
        try:
            await asyncio.sleep(_REFUSED_SECONDS)
        except asyncio.CancelledError:
            if call.is_at_its_deadline:
                call.error, call.code = None, "CANCELLED"
            raise
        call.error, call.code = None, "UNIMPLEMENTED"
        self.answers.over(rpc, call)
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{rpc} takes one request, got none")
        raise AssertionError("abort() raises")

    async def _refuse(
        self, error: ServerError, rpc: str, call: Call, context: aio.ServicerContext[Any, Any]
    ) -> NoReturn:
        reply = self.answers.refusal(error)
        call.error, call.code = error, reply.code.name
        self.answers.over(rpc, call)
        await context.abort(reply.code, reply.message)
        raise AssertionError("abort() raises")

    def _call(self, context: aio.ServicerContext[Any, Any]) -> Call:
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        identity = identity_from_auth(context.auth_context()) if self.certified else ""
        return Call("grpc", deadline, context.invocation_metadata() or (), identity, self.management)
