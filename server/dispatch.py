"""From the bytes of a call to the bytes of its answer: what every front end hands its calls to."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from protos.inference import grpc_service_pb2 as pb
from server.errors import InvalidRequest, ServerError, Unimplemented
from server.observer import Finished, Observer
from server.security import Guard
from server.service import Service
from server.status import code_of
from server.types import Call

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_REQUESTS: dict[str, type[Message]] = {rpc.name: GetMessageClass(rpc.input_type) for rpc in SERVICE.methods}

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
    """Parses, asks the guard, calls the service, serializes; tells observers.

    Attributes:
        observers: Told of every call when it is over; may be replaced while the server runs.
    """

    def __init__(self, service: Service, observers: Sequence[Observer] = (), guard: Guard | None = None) -> None:
        self.observers = observers
        self._guard = guard or Guard()
        self._handlers: dict[str, Callable[[Any, Call], Awaitable[Message]]] = {
            name: getattr(service, name) for name in _REQUESTS if hasattr(service, name)
        }

    async def unary(self, rpc: str, payload: bytes, call: Call) -> Reply:
        """Answers one call of an RPC that takes one message and gives one."""
        request = _REQUESTS[rpc]()
        try:
            request.ParseFromString(payload)
        except DecodeError:
            return Reply(grpc.StatusCode.INVALID_ARGUMENT, message=f"the payload is not a {type(request).__name__}")
        try:
            return Reply(grpc.StatusCode.OK, (await self.message(rpc, request, call)).SerializeToString())
        except Exception as error:
            return refusal(error, request)

    async def message(self, rpc: str, request: Message, call: Call) -> Message:
        """The same with messages instead of bytes.

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
            self._tell(Finished(rpc, call, request, error))

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


def refusal(error: Exception, request: Message) -> Reply:
    """What a client is told of an error; one that is no ServerError is a bug and goes to the log alone."""
    if not isinstance(error, ServerError):
        log.error("a bug in the server", exc_info=error)
        return Reply(grpc.StatusCode.INTERNAL, message="internal error; the server's log has the details")
    message = str(error)
    if isinstance(error, InvalidRequest) and isinstance(request, pb.ModelInferRequest):
        # Triton's prefix, which tells which request of many was wrong.
        message = f"[request id: {request.id or '<id_unknown>'}] {message}"
    return Reply(code_of(error), message=message[:_MESSAGE])
