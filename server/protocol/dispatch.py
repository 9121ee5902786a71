"""From the bytes of a call to the bytes of its answer: what every front end hands its calls to."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidRequest, QueueFull, ServerError, Unimplemented
from convoynet.server.observing.observer import Finished, Observer
from convoynet.server.protocol import wire
from convoynet.server.security.security import Guard
from convoynet.server.status import code_of
from convoynet.server.types import Call

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_REQUESTS: dict[str, type[Message]] = {rpc.name: GetMessageClass(rpc.input_type) for rpc in SERVICE.methods}
_PUSHBACK_S, _LONGEST_PUSHBACK_S = 0.1, 60.0
STREAM_INFLIGHT = 64
"""Requests of one stream that run at once; more wait with the client, by gRPC's flow control."""

# A message may quote the request; clients of gRPC refuse trailers of more than 8 KiB.
_MESSAGE = 2000


@dataclass(frozen=True, slots=True)
class Reply:
    """How a call ended: the answer's bytes where `code` is OK, else one line of text and metadata that goes with it."""

    code: grpc.StatusCode
    payload: bytes = b""
    message: str = ""
    trailers: tuple[tuple[str, str], ...] = ()


class Dispatcher:
    """Parses, asks the guard, calls a service, serializes; tells observers. Only `message` raises ServerError.

    Attributes:
        observers: Told of every call when it is over; may be replaced while the server runs.
    """

    def __init__(self, services: Iterable[object], *, guard: Guard | None = None, triton_compat: bool = False) -> None:
        """Makes a dispatcher.

        Args:
            services: Each has a coroutine for some of the RPCs, under its name.
            guard: Who may call what; None for everybody everything.
            triton_compat: Whether statuses are Triton's where they differ.
        """
        self.observers: Sequence[Observer] = ()
        self._guard = guard or Guard()
        self._triton = triton_compat
        self._handlers: dict[str, Callable[[Any, Call], Awaitable[Message]]] = {
            name: getattr(service, name) for service in services for name in _REQUESTS if hasattr(service, name)
        }

    async def unary(self, rpc: str, payload: bytes | memoryview, call: Call) -> Reply:
        """Answers one call of an RPC that takes one message and gives one."""
        request: Message | None = None
        try:
            request = _parse(rpc, payload, call)
            response = await self.message(rpc, request, call)
            return Reply(grpc.StatusCode.OK, wire.serialize(response, call.raw_outputs or ()))
        except Exception as error:
            return self.refusal(error, request)

    async def stream(self, rpc: str, payloads: AsyncIterator[bytes], call: Call) -> AsyncGenerator[Reply, None]:
        """Answers ModelStreamInfer: every request gets one reply, in the order in which they came.

        Requests of a stream run side by side, at most STREAM_INFLIGHT of them; the next is read when one of these
        is answered. An error is a reply of its own on a stream that goes on, unless the client's metadata asks
        (`triton_grpc_error: true`) that the stream ends with its status: then that is the last reply.
        """
        ends = call.header("triton_grpc_error") == "true"
        replies: asyncio.Queue[asyncio.Task[Reply] | None] = asyncio.Queue()
        slots = asyncio.Semaphore(STREAM_INFLIGHT)
        running: set[asyncio.Task[Any]] = set()

        async def read() -> None:
            try:
                async for payload in payloads:
                    await slots.acquire()
                    own = replace(call, arrived=time.perf_counter_ns())
                    task = asyncio.create_task(self._streamed(payload, own, ends=ends))
                    running.add(task)
                    replies.put_nowait(task)
            finally:
                replies.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await replies.get()) is not None:
                reply = await task
                running.discard(task)
                slots.release()
                yield reply
                if reply.code is not grpc.StatusCode.OK:
                    break
        finally:
            for task in (*running, reader):
                task.cancel()
            await asyncio.gather(*running, reader, return_exceptions=True)

    async def _streamed(self, payload: bytes, call: Call, *, ends: bool) -> Reply:
        """The answer to one request of a stream."""
        request: Message | None = None
        try:
            request = _parse("ModelInfer", payload, call)
            response = cast(pb.ModelInferResponse, await self.message("ModelInfer", request, call))
        except Exception as error:
            refused = self.refusal(error, request)
            if ends:
                return refused
            failed = pb.ModelStreamInferResponse(error_message=refused.message)
            failed.infer_response.id = request.id if isinstance(request, pb.ModelInferRequest) else ""
            return Reply(grpc.StatusCode.OK, failed.SerializeToString())
        response.parameters["triton_final_response"].bool_param = True
        return Reply(grpc.StatusCode.OK, wire.serialize(response, call.raw_outputs or (), streamed=True))

    async def message(self, rpc: str, request: Message, call: Call) -> Message:
        """The same as `unary` with messages instead of bytes.

        Raises:
            ServerError: Whatever went wrong.
        """
        if not self.observers:
            return await self._guarded(rpc, request, call)
        error: BaseException | None = None
        try:
            return await self._guarded(rpc, request, call)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._tell(Finished(rpc, call, request, error, self._triton))

    def check(self, rpc: str, call: Call) -> None:
        """Returns where the caller may have this call's message read; `message` asks again, with the message.

        Raises:
            Unauthenticated, NotPermitted: It may not.
        """
        self._guard.check(rpc, call)

    def _guarded(self, rpc: str, request: Message, call: Call) -> Awaitable[Message]:
        self._guard.check(rpc, call, request)
        if rpc not in self._handlers:
            raise Unimplemented(f"this server does not implement {rpc}")
        return self._handlers[rpc](request, call)

    def _tell(self, finished: Finished) -> None:
        """No observer's failure is the client's."""
        for observer in self.observers:
            try:
                observer.finished(finished)
            except Exception:
                log.exception("a bug in %s", type(observer).__name__)

    def refusal(self, error: Exception, request: Message | None = None) -> Reply:
        """What a client is told of an error; one that is no ServerError is a bug and goes to the log alone."""
        if not isinstance(error, ServerError):
            log.error("a bug in the server", exc_info=error, extra={"request_id": getattr(request, "id", "")})
            return Reply(grpc.StatusCode.INTERNAL, message="internal error; the server's log has the details")
        message = str(error)
        if isinstance(error, InvalidRequest) and isinstance(request, pb.ModelInferRequest):
            # Triton's prefix, which tells which request of many was wrong.
            message = f"[request id: {request.id or '<id_unknown>'}] {message}"
        trailers: tuple[tuple[str, str], ...] = ()
        if isinstance(error, QueueFull):
            # How long gRPC's own retries are to wait, in milliseconds.
            wait = math.ceil(1000 * min(error.drain_s or _PUSHBACK_S, _LONGEST_PUSHBACK_S))
            trailers = (("grpc-retry-pushback-ms", str(wait)),)
        return Reply(code_of(error, triton=self._triton), message=message[:_MESSAGE], trailers=trailers)


def _parse(rpc: str, payload: bytes | memoryview, call: Call) -> Message:
    """The request of a call; large raw tensors stay in the payload, and those of the answer beside its message.

    Raises:
        InvalidRequest: The payload is no such message.
    """
    kind = _REQUESTS[rpc]
    try:
        if kind is pb.ModelInferRequest:
            request, call.raw_inputs = wire.parse(payload)
            call.raw_outputs = []
            return request
        return kind.FromString(bytes(payload))
    except DecodeError:
        raise InvalidRequest(f"the payload is not a {kind.__name__}") from None
