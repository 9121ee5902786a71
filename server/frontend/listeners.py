"""The ports of one server, with TLS and who may use them: gRPC, HTTP, metrics, and management ports of their own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry

from convoynet.server.config import ServeConfig
from convoynet.server.frontend.local import LocalFrontEnd, Manner
from convoynet.server.frontend.processes import FrontEndProcesses
from convoynet.server.http import api
from convoynet.server.http.application import Counted, HttpApp, MetricsApp
from convoynet.server.http.connection import Application
from convoynet.server.http.listener import HttpListener
from convoynet.server.http.openapi import offered
from convoynet.server.http.routes import Routes
from convoynet.server.memory.budget import Budget
from convoynet.server.protocol.dispatch import Dispatcher
from convoynet.server.security.reloading import LOOK_SECONDS, Reloaded, keep_fresh
from convoynet.server.security.security import Entry, Guard, read_tokens
from convoynet.server.security.tls import HTTP, Certificates, TlsFiles
from convoynet.server.supervision import tasks

log = logging.getLogger(__name__)

MANAGEMENT_HOST = "127.0.0.1"
"""Where a management listener of its own listens, whatever --host says."""
METADATA_BYTES = 64 * 2**10
"""The most metadata of one gRPC call."""


class Access:
    """The certificates and tokens of one server, as their files are now.

    Attributes:
        certificates: What every port shows; None for no TLS.
        guard: Who may call what.

    Raises:
        InvalidFile: A file cannot be used.
    """

    def __init__(self, config: ServeConfig, refused: Callable[[], None]) -> None:
        self.certificates: Certificates | None = None
        if config.tls_cert is not None and config.tls_key is not None:
            self.certificates = Certificates(TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca))
        self._tokens: Reloaded[tuple[Entry, ...]] | None = None
        if (file := config.auth_tokens) is not None:
            self._tokens = Reloaded("tokens", [file], lambda: read_tokens(file))
        self.guard = Guard(self._tokens, refused)
        if not config.loopback and (self.certificates is None or self._tokens is None):
            missing = " and ".join(
                flag for flag, have in (("--tls-cert", self.certificates), ("--auth-tokens", self._tokens)) if not have
            )
            log.warning("listening on %s without %s: docs/security.md says who can do what", config.host, missing)

    @property
    def parts(self) -> list[Reloaded[Any]]:
        """What is read again when its files change."""
        return [part for part in (self.certificates, self._tokens) if part is not None]

    def refresh(self) -> None:
        """Reads what changed now."""
        for part in self.parts:
            part.refresh()


class Listeners:
    """Every port of one server, on the running event loop.

    Attributes:
        grpc_port, http_port, metrics_port: What it listens on, once started; http_port -1 for none.
        management_ports: The same for management ports of their own: none, gRPC, or gRPC and HTTP.
    """

    def __init__(
        self,
        config: ServeConfig,
        access: Access,
        dispatcher: Dispatcher,
        counted: Counted,
        registry: CollectorRegistry,
        page: Routes,
    ) -> None:
        """Makes them.

        Args:
            config: The server's settings.
            access: Certificates and tokens.
            dispatcher: What answers calls.
            counted: Told how each call over HTTP ended.
            registry: What the metrics port shows.
            page: What the HTTP port has beside the protocol.
        """
        self._config, self._access = config, access
        self.grpc_port = self.metrics_port = 0
        self.http_port = -1
        self.management_ports: tuple[int, ...] = ()
        self._fresh: asyncio.Task[None] | None = None
        self._grpc = [self._front_end(dispatcher)]
        budget, largest = dispatcher.budget, config.max_message_bytes
        app = HttpApp(dispatcher, counted, largest, config.takes_management, offered(api.ROUTES, page))
        self._http = [self._http_listener(app, budget)]
        if config.management_ports:
            own = Manner(_options(config), triton=config.triton_compat)
            self._grpc.append(LocalFrontEnd(dispatcher, own, budget=budget, certificates=access.certificates))
        if len(config.management_ports) > 1:
            managed = HttpApp(dispatcher, counted, largest, True, offered(api.ROUTES))
            self._http.append(self._http_listener(managed, budget))
        self._metrics = self._http_listener(MetricsApp(registry, access.guard))

    @property
    def frontends(self) -> int:
        """Processes that take calls of gRPC now, the core's own among them."""
        return self._grpc[0].up

    async def start(self) -> None:
        """Listens on every port.

        Raises:
            OSError: One of them is taken.
        """
        config = self._config
        self.grpc_port = await self._grpc[0].start(config.host, config.grpc_port)
        self.metrics_port = await _listen(self._metrics, config.host, config.metrics_port, "metrics")
        if config.http_port >= 0:
            self.http_port = await _listen(self._http[0], config.host, config.http_port, "HTTP")
        ports = config.management_ports
        if ports:
            self.management_ports = (await self._grpc[1].start(MANAGEMENT_HOST, ports[0]),)
        if len(ports) > 1:
            port = await _listen(self._http[1], MANAGEMENT_HOST, ports[1], "HTTP management")
            self.management_ports = (*self.management_ports, port)
        look = partial(keep_fresh, self._access.parts, LOOK_SECONDS)
        self._fresh = tasks.keep(look, "the look at certificates and tokens")

    async def set_health(self, service: str, status: int) -> None:
        """What health says of a service from now on, on every gRPC port."""
        for front in self._grpc:
            await front.set(service, status)

    async def not_serving(self) -> None:
        """Health says NOT_SERVING of everything, whatever is set later."""
        for front in self._grpc:
            await front.not_serving()

    async def drain(self, limit_seconds: float) -> bool:
        """Takes no new calls, lets those under way finish, and cancels those that outlast the limit.

        Returns:
            Whether all of them finished.
        """
        stopping = [listener.stop(limit_seconds) for listener in self._http]
        return all(await asyncio.gather(self._stop_grpc(limit_seconds), *stopping))

    async def stop(self) -> None:
        """Stops what is left: the metrics port, which answers during the drain as well."""
        await self._metrics.stop(1.0)
        if self._fresh is not None:
            self._fresh.cancel()

    async def _stop_grpc(self, limit_seconds: float) -> bool:
        begun = time.monotonic()
        await asyncio.gather(*(server.stop(limit_seconds) for server in self._grpc))
        return time.monotonic() - begun < limit_seconds

    def _front_end(self, dispatcher: Dispatcher) -> LocalFrontEnd | FrontEndProcesses:
        config, certificates = self._config, self._access.certificates
        budget, count = dispatcher.budget, config.frontend_count
        manner = Manner(_options(config), config.takes_management, config.grpc_stack == "grpcio", config.triton_compat)
        if count == 1:
            return LocalFrontEnd(dispatcher, manner, budget=budget, certificates=certificates)
        tls = None if certificates is None else certificates.files
        # What a front end holds, the core holds too, or has held.
        room, refused = budget.limit // count, budget.refused
        return FrontEndProcesses(count, dispatcher, manner, room=room, refused=refused, tls=tls)

    def _http_listener(self, app: Application, budget: Budget | None = None) -> HttpListener:
        certificates = self._access.certificates
        return HttpListener(app, None if certificates is None else certificates.context(HTTP), budget)


async def _listen(listener: HttpListener, host: str, port: int, what: str) -> int:
    try:
        return await listener.start(host, port)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} for {what}: {error.strerror}") from error


def _options(config: ServeConfig) -> tuple[tuple[str, int], ...]:
    """What every gRPC server is told."""
    ages = {
        "grpc.max_connection_age_ms": config.grpc_max_connection_age,
        "grpc.max_connection_age_grace_ms": config.grpc_max_connection_age_grace,
    }
    most_held = config.max_inflight_bytes // config.frontend_count
    return (
        *((name, milliseconds) for name, milliseconds in ages.items() if milliseconds),
        ("grpc.keepalive_time_ms", config.grpc_keepalive_time),
        ("grpc.keepalive_timeout_ms", config.grpc_keepalive_timeout),
        ("grpc.keepalive_permit_without_calls", int(config.grpc_keepalive_permit_without_calls)),
        ("grpc.http2.max_pings_without_data", config.grpc_http2_max_pings_without_data),
        (
            "grpc.http2.min_ping_interval_without_data_ms",
            config.grpc_http2_min_recv_ping_interval_without_data,
        ),
        ("grpc.http2.max_ping_strikes", config.grpc_http2_max_ping_strikes),
        # What is larger than all that may be held is refused before gRPC has unpacked more of it than that.
        ("grpc.max_receive_message_length", min(config.max_message_bytes, most_held)),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_streams),
        # Else gRPC lets a client send megabytes of a message that nobody has asked for yet.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        # Above 1,000 calls that no handler has begun gRPC cancels some by chance, which no client retries and
        # nothing counts. Refusing is the queue's, with a status that tells why.
        ("grpc.server.max_pending_requests", 2**16),
        ("grpc.server.max_pending_requests_hard_limit", 2**16),
    )
