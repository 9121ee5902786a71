"""From the bytes of a call to the bytes of its answer: what every front end hands its calls to."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import AnswerTooLarge, InvalidRequest, OverBudget, ServerError, Unimplemented
from convoynet.server.memory.budget import Budget
from convoynet.server.observing.observer import Finished, Observer
from convoynet.server.protocol import wire
from convoynet.server.protocol.forms import Forms, Found
from convoynet.server.security.security import SETTINGS, Guard
from convoynet.server.status import code_of
from convoynet.server.types import Call

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_REQUESTS: dict[str, tuple[type[Message], Descriptor]] = {
    rpc.name: (GetMessageClass(rpc.input_type), rpc.input_type) for rpc in SERVICE.methods
}
_COUNTED = ("ModelInfer", "")
_LONGEST_PUSHBACK_S = 60.0
STREAM_INFLIGHT = 64
"""Requests of one stream that run at once; more wait with the client, by gRPC's flow control."""

# A message may quote the request; clients of gRPC refuse trailers of more than 8 KiB, where a byte may take three.
_MESSAGE = 2000
_QUOTED_ID = 256


@dataclass(slots=True)
class Reply:
    """How a call ended: the answer's bytes where `code` is OK, else one line of text and metadata that goes with it.

    `full` is whether the whole server was, not one model: over HTTP 503, not 429.
    """

    code: grpc.StatusCode
    payload: bytes = b""
    message: str = ""
    trailers: tuple[tuple[str, str], ...] = ()
    full: bool = False


@runtime_checkable
class Inference(Protocol):
    """A service that knows forms of requests."""

    forms: Forms

    async def infer_alike(self, found: Found, call: Call) -> bytes | None:
        """The answer to a request of a known form, serialized; None where it has to be parsed."""
        ...


class Dispatcher:
    """Parses, asks the guard, calls a service, serializes; tells observers. Only `message` raises ServerError.

    Attributes:
        observers: Told of every call when it is over; may be replaced while the server runs.
    """

    def __init__(
        self,
        services: Iterable[object],
        *,
        guard: Guard | None = None,
        triton_compat: bool = False,
        budget: Budget | None = None,
        counted: Callable[[Call], None] = lambda call: None,
        largest: int = 2**63,
    ) -> None:
        """Makes a dispatcher.

        Args:
            services: Each has a coroutine for some of the RPCs, under its name.
            guard: Who may call what; None for everybody everything.
            triton_compat: Whether statuses are Triton's where they differ.
            budget: What requests and answers count for; None for a budget without end.
            counted: Counts an inference request that is over (Ledger.over).
            largest: Bytes that an answer may have as one message of gRPC.
        """
        self.observers: Sequence[Observer] = ()
        self.budget = budget or Budget(2**63)
        self._guard = guard or Guard()
        self._triton = triton_compat
        self._counted = counted
        self._largest = largest
        services = list(services)
        self._handlers: dict[str, Callable[[Any, Call], Awaitable[Message]]] = {
            name: getattr(service, name) for service in services for name in _REQUESTS if hasattr(service, name)
        }
        self._inference = next((service for service in services if isinstance(service, Inference)), None)

    def refused(self, rpc: str, call: Call) -> Reply | None:
        """The refusal of a call whose caller may not make it, before anything is done with its request."""
        try:
            self._allow(rpc, call)
        except ServerError as error:
            self._tell(Finished(rpc, call, None, error, self._triton))
            return self._refused(error, call)
        return None

    def over(self, rpc: str, call: Call) -> None:
        """Counts a call that is over: an inference request, or one of a method that there is not ("")."""
        if rpc in _COUNTED:
            self._counted(call)

    async def unary(self, rpc: str, payload: bytes | memoryview, call: Call) -> Reply:
        """Answers one call of an RPC that takes one message and gives one."""
        request, held, answer, found = None, 0, None, None
        try:
            inference = self._inference
            if rpc == "ModelInfer" and inference is not None and not self.observers:  # who are shown its message
                self._allow(rpc, call)
                found = inference.forms.find(payload, call)
                if found is not None:
                    self.budget.take(len(payload))
                    held = len(payload)
                    answer = await inference.infer_alike(found, call)
            if answer is None:
                self.budget.give(held)
                held = 0
                request, held = self._opened(rpc, payload, call)
                response = await self.message(rpc, request, call)
                answer = wire.serialize(response, call.raw_outputs or ())
            if len(answer) > self._largest:
                raise AnswerTooLarge(len(answer), self._largest)
            call.code = "OK"
            return Reply(grpc.StatusCode.OK, answer)
        except Exception as error:
            if found is not None and request is None:
                request = pb.ModelInferRequest(id=found.id)
            return self._refused(error, call, request)
        finally:
            call.raw_inputs, call.raw_outputs = (), None
            self.budget.give(held)

    async def stream(self, rpc: str, payloads: AsyncIterator[bytes], call: Call) -> AsyncGenerator[Reply, None]:
        """Answers ModelStreamInfer: every request gets one reply, in the order in which they came.

        Requests of a stream run side by side, at most STREAM_INFLIGHT of them; the next is read when one of these
        is answered. An error is a reply of its own on a stream that goes on, unless the client's metadata asks
        (`triton_grpc_error: true`) that the stream ends with its status: then that is the last reply.

        Raises:
            ServerError: Reading the next request failed; what had come was answered.
        """
        ends = call.header("triton_grpc_error") == "true"
        replies: asyncio.Queue[asyncio.Task[tuple[Reply, int]] | None] = asyncio.Queue()
        slots = asyncio.Semaphore(STREAM_INFLIGHT)
        running: dict[asyncio.Task[Any], Call] = {}

        async def read() -> None:
            try:
                async for payload in payloads:
                    await slots.acquire()
                    own = replace(call, arrived=time.perf_counter_ns())
                    task = asyncio.create_task(self._streamed(payload, own, ends=ends))
                    running[task] = own
                    replies.put_nowait(task)
            finally:
                replies.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await replies.get()) is not None:
                reply, held = await task
                self.over("ModelInfer", running.pop(task))
                slots.release()
                try:
                    yield reply
                finally:
                    self.budget.give(held)
                if reply.code is not grpc.StatusCode.OK:
                    return
            await reader
        finally:
            for task in (*running, reader):
                task.cancel()
            for left in await asyncio.gather(*running, reader, return_exceptions=True):
                if isinstance(left, tuple):
                    self.budget.give(left[1])
            for own in running.values():
                own.code = "CANCELLED"  # whatever had come of it: nobody was told
                self.over("ModelInfer", own)

    async def _streamed(self, payload: bytes, call: Call, *, ends: bool) -> tuple[Reply, int]:
        """The answer to one request of a stream, and what it counts for until it is sent."""
        request, held = None, 0
        try:
            request, held = self._opened("ModelInfer", payload, call)
            response = cast(pb.ModelInferResponse, await self.message("ModelInfer", request, call))
            response.parameters["triton_final_response"].bool_param = True
            answer = wire.serialize(response, call.raw_outputs or (), streamed=True)
            if len(answer) > self._largest:
                raise AnswerTooLarge(len(answer), self._largest)
            self.budget.take(len(answer))
            call.code = "OK"
            return Reply(grpc.StatusCode.OK, answer), len(answer)
        except Exception as error:
            refused = self._refused(error, call, request)
            if ends:
                return refused, 0
            failed = pb.ModelStreamInferResponse(error_message=refused.message)
            failed.infer_response.id = request.id if isinstance(request, pb.ModelInferRequest) else ""
            return Reply(grpc.StatusCode.OK, failed.SerializeToString()), 0
        finally:
            call.raw_inputs = ()
            self.budget.give(held)

    def _allow(self, rpc: str, call: Call) -> None:
        """Asks the guard, once for each RPC of a call.

        Raises:
            Unauthenticated, NotPermitted: The caller may not.
        """
        if call.allowed != rpc:
            self._guard.check(rpc, call)
            call.allowed = rpc

    def _opened(self, rpc: str, payload: bytes | memoryview, call: Call) -> tuple[Message, int]:
        """The request of a call, and what it counts for: asks whether the caller may, whether there is room, parses.

        Large raw tensors stay in the payload, and those of the answer beside its message.

        Raises:
            ServerError: The caller may not, there is no room, or the payload is no such message.
        """
        held = 0
        kind, descriptor = _REQUESTS[rpc]
        try:
            self._allow(rpc, call)
            plain, raw = wire.taken_apart(payload, descriptor)
            size = wire.footprint(payload, plain)
            self.budget.take(size)
            held = size
            if kind is pb.ModelInferRequest:
                call.raw_inputs, call.raw_outputs = raw, []
            return kind.FromString(plain), held
        except (ServerError, DecodeError) as error:
            self.budget.give(held)
            if isinstance(error, DecodeError):
                error = InvalidRequest(f"the payload is not a {kind.__name__}")
            self._tell(Finished(rpc, call, None, error, self._triton))
            raise error from None

    async def message(self, rpc: str, request: Message, call: Call) -> Message:
        """The same as `unary` with messages instead of bytes.

        Raises:
            ServerError: Whatever went wrong.
        """
        try:
            if call.allowed != rpc:
                self._allow(rpc, call)
            if rpc in SETTINGS:
                self._guard.check(rpc, call, request)
            if rpc not in self._handlers:
                raise Unimplemented(f"this server does not implement {rpc}")
            return await self._handlers[rpc](request, call)
        except asyncio.CancelledError:
            call.error = asyncio.CancelledError()  # the one that is raised has seen the request, and would keep it
            raise
        except BaseException as raised:
            call.error = raised
            raise
        finally:
            if self.observers:
                self._tell(Finished(rpc, call, request, call.error, self._triton))

    def _tell(self, finished: Finished) -> None:
        """No observer's failure is the client's."""
        for observer in self.observers:
            try:
                observer.finished(finished)
            except Exception:
                log.exception("a bug in %s", type(observer).__name__)

    def _refused(self, error: Exception, call: Call, request: Message | None = None) -> Reply:
        """What the client of a call is told; noted for whoever counts the call."""
        reply = self.refusal(error, request)
        call.error, call.code = error, reply.code.name
        return reply

    def refusal(self, error: Exception, request: Message | None = None) -> Reply:
        """What a client is told of an error; one that is no ServerError is a bug and goes to the log alone."""
        try:
            return self._reply(error, request)
        finally:
            _forget_frames(error)

    def _reply(self, error: Exception, request: Message | None) -> Reply:
        if not isinstance(error, ServerError):
            log.error("a bug in the server", exc_info=error, extra={"request_id": getattr(request, "id", "")})
            return Reply(grpc.StatusCode.INTERNAL, message="internal error; the server's log has the details")
        message = str(error)
        if isinstance(error, InvalidRequest) and isinstance(request, pb.ModelInferRequest):
            # Triton's prefix, which tells which request of many was wrong.
            message = f"[request id: {request.id[:_QUOTED_ID] or '<id_unknown>'}] {message}"
        trailers: tuple[tuple[str, str], ...] = ()
        if error.retry_s is not None:
            # How long gRPC's own retries are to wait, in milliseconds.
            wait = math.ceil(1000 * min(error.retry_s, _LONGEST_PUSHBACK_S))
            trailers = (("grpc-retry-pushback-ms", str(wait)),)
        code, full = code_of(error, triton=self._triton), isinstance(error, OverBudget)
        text = message.encode(errors="replace")[:_MESSAGE].decode(errors="ignore")
        return Reply(code, message=text, trailers=trailers, full=full)


def _forget_frames(error: BaseException | None) -> None:
    """Lets go of what an error has seen, tensors among it, which would stay until the collector of garbage comes."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__
