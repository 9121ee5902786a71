"""A gRPC server with health and reflection around whatever answers: in the core process, or in one of several."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpc import aio
from grpc_health.v1 import health_pb2

from convoynet.server.frontend import companions, grpc_frontend, grpcio_server
from convoynet.server.frontend.health import Health
from convoynet.server.frontend.remote import Remote
from convoynet.server.frontend.requests import Requests
from convoynet.server.frontend.session import Answers
from convoynet.server.memory.budget import Budget
from convoynet.server.protocol.dispatch import SERVICE
from convoynet.server.security.tls import Certificates
from convoynet.server.supervision import tasks

log = logging.getLogger(__name__)

if TYPE_CHECKING:  # pygrpc-native need not be there
    from convoynet.server.frontend.native_server import NativeServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_STEADY_SECONDS = 60.0
"""A server that lived so long is started again soon when it ends by itself; one that did not after a longer pause."""


@dataclass(frozen=True)
class Manner:
    """How a gRPC port is served; JSON can carry it.

    Attributes:
        options: grpcio's channel arguments.
        management: Whether the port takes management calls.
        native: Whether pygrpc-native ends HTTP/2 instead of grpcio; it has no TLS.
        triton: Whether statuses are Triton's where they differ.
    """

    options: tuple[tuple[str, int], ...] = ()
    management: bool = True
    native: bool = False
    triton: bool = False


class LocalFrontEnd:
    """One gRPC server on the running event loop.

    Attributes:
        up: How many servers listen: 1, or 0 where it has ended by itself and is not started again yet.

    Args:
        answers: Where the calls go.
        manner: How.
        budget: What requests and answers count for; None for a budget without end.
        certificates: For TLS; None for none.
        shared: Whether other processes listen on the port too. Then a server that ends by itself is not started again:
            its process is to end.
    """

    def __init__(
        self,
        answers: Answers,
        manner: Manner,
        *,
        budget: Budget | None = None,
        certificates: Certificates | None = None,
        shared: bool = False,
    ) -> None:
        self.up = 0
        self._certificates, self._shared = certificates, shared
        self._keeper: asyncio.Task[None] | None = None
        self._health = Health()
        budget = budget or Budget(2**63)
        self._requests = Requests(budget)
        self._options = [*manner.options, ("grpc.so_reuseport", int(shared))]
        methods = grpc_frontend.methods(
            answers, self._requests, budget, manner.management, certified=certificates is not None
        )
        self._services = {SERVICE.full_name: methods, **companions.handlers(self._health, self._requests)}
        self._manner, self._answers = manner, answers
        self._server: Any = self._made()

    async def start(self, host: str, port: int) -> int:
        """Listens.

        Returns:
            The port, which is chosen where 0 is asked for.

        Raises:
            OSError: It is taken.
        """
        port = await self._listen(host, port)
        if not self._shared:
            self._keeper = tasks.start(self._keep(host, port), "the watch over a gRPC server")
        return port

    async def ended(self) -> None:
        """Waits until the server has ended, asked or by itself."""
        # In a task that is not cancelled with this one: grpcio's own stop waits for the same thing.
        end = asyncio.ensure_future(self._server.wait_for_termination())
        await asyncio.wait([end])
        if (error := end.exception()) is not None:
            log.error("a gRPC server has ended by itself", exc_info=error)

    async def _keep(self, host: str, port: int) -> None:
        """Starts another whenever the last one has ended by itself."""
        loop, pauses = asyncio.get_running_loop(), tasks.Pauses(0.1)
        while True:
            begun = loop.time()
            await self.ended()
            self.up = 0
            log.error("nothing takes calls of gRPC on port %d: another server is started", port)
            if loop.time() - begun > _STEADY_SECONDS:
                pauses.reset()
            while not self.up:
                await asyncio.sleep(pauses.next())
                try:
                    self._server = self._made()
                    await self._listen(host, port)
                except Exception as error:
                    log.error("no gRPC server can be started: %s: %s", type(error).__name__, error)

    def _made(self) -> aio.Server | NativeServer:
        server = grpcio_server.server(self._options, self._services, grpc_frontend.unknown(self._answers))
        if self._manner.native:
            return _native(self._options, self._answers, self._manner.management, server)
        return server

    async def _listen(self, host: str, port: int) -> int:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._certificates is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._certificates.grpc_credentials())
        except RuntimeError as error:
            raise taken(host, port) from error
        await self._server.start()
        self.up = 1
        return port

    async def set(self, service: str, status: int) -> None:
        """What health says of a service from now on."""
        await self._health.set(service, status)

    async def not_serving(self) -> None:
        """Health says NOT_SERVING of everything, whatever is set later."""
        await self._health.not_serving()

    async def stop(self, limit: float) -> None:
        """Refuses new calls, lets those finish whose request came, and cancels those that outlast `limit` seconds."""
        if self._keeper is not None:
            self._keeper.cancel()
        self._health.end()
        self._requests.end()
        await self._server.stop(limit)


def _native(options: Sequence[tuple[str, int]], answers: Answers, management: bool, behind: aio.Server) -> NativeServer:
    """pygrpc-native before a server of grpcio."""
    from convoynet.server.frontend.native_server import NativeServer

    if not isinstance(answers, Remote):
        raise AssertionError("what pygrpc-native takes nobody bounds: it has a process of its own")
    return NativeServer(options, answers, management, behind)


def taken(host: str, port: int) -> OSError:
    """The error of a port that something else listens on."""
    return OSError(f"cannot listen on {host}:{port} for gRPC: is the port taken?")
