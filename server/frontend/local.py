"""A gRPC server with health and reflection around whatever answers: in the core process, or in one of several."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2

from convoynet.server.frontend import companions, grpc_frontend, grpcio_server
from convoynet.server.frontend.calls import Calls
from convoynet.server.frontend.handled import Reads
from convoynet.server.frontend.health import Health
from convoynet.server.frontend.requests import Requests
from convoynet.server.frontend.session import Answers
from convoynet.server.http2.frames import MOST_WINDOW
from convoynet.server.http2.listener import Limits, Listener
from convoynet.server.memory.budget import Budget
from convoynet.server.protocol.dispatch import SERVICE
from convoynet.server.security.tls import HTTP2, Certificates
from convoynet.server.supervision import tasks

log = logging.getLogger(__name__)

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
        grpcio: Whether grpcio ends HTTP/2 instead of the server's own code.
        triton: Whether statuses are Triton's where they differ.
    """

    options: tuple[tuple[str, int], ...] = ()
    management: bool = True
    grpcio: bool = False
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
        self._manner, self._answers, self._budget = manner, answers, budget
        self._requests: Requests | Reads
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

    def _made(self) -> aio.Server | Listener:
        options = dict(self._manner.options)
        if self._manner.grpcio:
            self._requests = Requests(self._budget, options.get("grpc.max_receive_message_length", MOST_WINDOW))
            options |= {"grpc.so_reuseport": int(self._shared), "grpc.per_message_decompression": 0}
            unknown = grpc_frontend.unknown(self._answers)
            return grpcio_server.server(list(options.items()), self._services(), unknown)
        calls = Calls(
            self._answers,
            self._budget,
            options.get("grpc.max_receive_message_length", MOST_WINDOW),
            options.get("grpc.max_concurrent_streams", MOST_WINDOW),
            management=self._manner.management,
        )
        self._requests = Reads(calls)
        calls.handle(self._services())
        context = None if self._certificates is None else self._certificates.context(HTTP2)
        return Listener(calls, _limits(options), context)

    def _services(self) -> dict[str, dict[str, grpc.RpcMethodHandler]]:
        """Handlers of the methods of each service."""
        certified = self._certificates is not None
        methods = grpc_frontend.methods(
            self._answers, self._requests, self._budget, self._manner.management, certified=certified
        )
        return {SERVICE.full_name: methods, **companions.handlers(self._health, self._requests)}

    async def _listen(self, host: str, port: int) -> int:
        if isinstance(self._server, Listener):
            try:
                port = await self._server.start(host, port, shared=self._shared)
            except OSError as error:
                raise taken(host, port) from error
            self.up = 1
            return port
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

    def hold(self, held: bool) -> None:
        """Reads from no client while `held`: what it says could go nowhere. grpcio's server goes on."""
        if isinstance(self._server, Listener):
            self._server.hold(held)

    async def stop(self, limit: float) -> None:
        """Refuses new calls, lets those finish whose request came, and cancels those that outlast `limit` seconds."""
        if self._keeper is not None:
            self._keeper.cancel()
        begun = time.monotonic()
        if isinstance(self._server, Listener):
            await self._server.leave(limit)  # before any call is refused, which most clients do not try again
        self._health.end()
        self._requests.end()
        await self._server.stop(max(0.0, limit - (time.monotonic() - begun)))


def _limits(options: Mapping[str, int]) -> Limits:
    """What grpcio's channel arguments say of connections."""

    def seconds(name: str) -> float:
        return options.get(name, 0) / 1000

    return Limits(
        keepalive=seconds("grpc.keepalive_time_ms"),
        keepalive_timeout=seconds("grpc.keepalive_timeout_ms"),
        permit_without_calls=bool(options.get("grpc.keepalive_permit_without_calls")),
        least_seconds=seconds("grpc.http2.min_ping_interval_without_data_ms"),
        strikes=options.get("grpc.http2.max_ping_strikes", 0),
        age=seconds("grpc.max_connection_age_ms"),
        age_grace=seconds("grpc.max_connection_age_grace_ms"),
    )


def taken(host: str, port: int) -> OSError:
    """The error of a port that something else listens on."""
    return OSError(f"cannot listen on {host}:{port} for gRPC: is the port taken?")
