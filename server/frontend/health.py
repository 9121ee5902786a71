"""grpc.health.v1 on one gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2

_Status = health_pb2.HealthCheckResponse


class Health:
    """What is served, for those that ask and those that watch.

    In the place of grpcio's own: there, whoever stops watching a service takes the other watchers of it along, who
    are told of no further change; and a stream of Watch, which never ends, holds up the end of the server.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {"": _Status.SERVING}
        self._final = self._ended = False
        self._changed = asyncio.Event()

    async def set(self, service: str, status: int) -> None:
        """What health says of a service from now on."""
        if not self._final:
            self._statuses[service] = status
            self._wake()

    async def not_serving(self) -> None:
        """NOT_SERVING of everything, whatever is set later."""
        self._final = True
        self._statuses = dict.fromkeys(self._statuses, _Status.NOT_SERVING)
        self._wake()

    def end(self) -> None:
        """Ends what watches: the server is about to stop."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        """The status of a service now."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return _Status(status=status)

    async def Watch(self, request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        """The status of a service now, and whenever it has changed."""
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _Status.SERVICE_UNKNOWN)
            if status != told:
                told = status
                yield _Status(status=status)
            elif self._ended:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
            else:
                await changed.wait()
