"""grpcio's server, of which no call can end the loop that waits for calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import grpc
from grpc import aio
from grpc._cython import cygrpc
from grpc.aio import _server

VERSION = version("grpcio")

log = logging.getLogger(__name__)


def _no_gone_client(record: logging.LogRecord) -> bool:
    """Whether a record of grpcio is of anything but an answer that its client is no longer there to take.

    grpcio keeps silent of those itself where it has heard in time, and else logs an error with a traceback.
    """
    return record.exc_info is None or not isinstance(record.exc_info[1], cygrpc.ExecuteBatchError)


def server(
    options: Sequence[tuple[str, object]],
    services: Mapping[str, dict[str, grpc.RpcMethodHandler]],
    unknown: grpc.RpcMethodHandler,
) -> aio.Server:
    """A server of some services.

    Args:
        options: grpcio's channel arguments.
        services: Their methods by name, by service.
        unknown: Handles the calls of every other method.
    """
    known = {f"/{service}/{name}": method for service, methods in services.items() for name, method in methods.items()}
    try:
        _require_parts()
        logging.getLogger(cygrpc.__name__).addFilter(_no_gone_client)  # once, however often it is added
        return _Server(options, known, unknown)
    except (AttributeError, TypeError) as error:
        log.warning("grpcio %s is not known here, where a call of an odd path may end the server: %s", VERSION, error)
    made = aio.server(options=options)
    for service, methods in services.items():
        made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    made.add_generic_rpc_handlers((Any(unknown),))
    return made


def _require_parts() -> None:
    """Looks whether this grpcio has the private parts that are replaced and used here.

    Raises:
        AttributeError: It has not.
    """
    for whose, names in (
        (cygrpc, ("_handle_rpc", "_schedule_rpc_coro", "get_working_loop", "ExecuteBatchError")),
        (cygrpc.AioServer, ("_make_request_call_future", "_request_call", "_request_registered_call")),
        (cygrpc.AioServer, ("_server_main_loop", "shutdown")),
    ):
        for name in names:
            getattr(whose, name)


class Any(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """One handler for whatever method is called."""

    def __init__(self, handler: grpc.RpcMethodHandler) -> None:
        self._handler = handler

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """The handler of a call."""
        return self._handler


class _Server(_server.Server):  # type: ignore[misc]
    """Made as aio.server() does, around another inner server."""

    def __init__(
        self,
        options: Sequence[tuple[str, object]],
        known: dict[str, grpc.RpcMethodHandler],
        unknown: grpc.RpcMethodHandler,
    ) -> None:
        self._loop = cygrpc.get_working_loop()
        self._server = _Calls(self._loop, None, (), (), tuple(options), None)
        self._server.serve(known, unknown)


class _Calls(cygrpc.AioServer):  # type: ignore[misc]
    """A task for each method waits for its calls, and one for the calls of all others.

    grpcio has one loop for all, which looks at every method after every call, and which ends, with the server, at a
    path that is not UTF-8. Nothing needs the path: the name of a registered method is known, and the others have none.
    """

    def serve(self, known: dict[str, grpc.RpcMethodHandler], unknown: grpc.RpcMethodHandler) -> None:
        """What it serves: methods by path, and what handles all others."""
        self._known, self._unknown = known, unknown
        self._held: set[asyncio.Task[None]] = set()
        self._ending = False
        self._cancelled: list[asyncio.CancelledError] = []
        self.add_registered_method_handlers(known)

    async def shutdown(self, grace: float | None) -> None:
        """See grpcio."""
        self._ending = True
        await super().shutdown(grace)

    async def _server_main_loop(self, started: asyncio.Future[bool]) -> None:
        """grpcio's, which takes any cancellation for a wanted one and leaves a port that answers nobody."""
        try:
            await super()._server_main_loop(started)
        except asyncio.CancelledError:
            if self._ending:
                raise
            raise RuntimeError("what waits for the calls of gRPC was cancelled") from None

    def resolve_handler(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """What grpcio asks of whom it takes for its resolver of methods."""
        return self._known.get(details.method, self._unknown)

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[None]:
        """What grpcio's loop waits for: done when no more calls come."""
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        taking = asyncio.get_running_loop().create_task(self._take(method, over))
        self._held.add(taking)  # a loop holds its tasks weakly
        taking.add_done_callback(self._held.discard)
        return over

    async def _take(self, method: bytes | None, over: asyncio.Future[None]) -> None:
        loop, name = asyncio.get_running_loop(), "" if method is None else method.decode()
        try:
            while True:
                state = await (self._request_call() if method is None else self._request_registered_call(method))
                handling = cygrpc._handle_rpc(name, self, (), state, loop, False)
                task = loop.create_task(cygrpc._schedule_rpc_coro(handling, state, loop, name))
                self._held.add(task)
                task.add_done_callback(self._held.discard)
                del state, handling, task
        except asyncio.CancelledError as error:
            self._cancelled.append(error)  # whose frames hold what grpc's core may still write to
            over.cancel()
            raise
        except Exception as error:
            if not over.done():
                over.set_exception(error)
                over.exception()  # grpcio's loop may look at another's alone
