"""The composition root: builds every part of a server, starts it, drains it, stops it."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version as distribution_version

from grpc_health.v1 import health, health_pb2
from prometheus_client import CollectorRegistry

from server import repository
from server.config import ServeConfig
from server.core import Core
from server.dispatch import SERVICE, Dispatcher
from server.errors import InvalidModel
from server.listeners import Access, Listeners
from server.metrics import Metrics, TritonAliases
from server.model import Model
from server.service import Service

log = logging.getLogger(__name__)

_SERVICE = SERVICE.full_name
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class App:
    """One server. Made, started and stopped on one event loop.

    Attributes:
        core: Its models.
    """

    def __init__(self, config: ServeConfig) -> None:
        defaults = repository.Defaults(config.max_queue, config.threads)
        found = repository.scan(config.model_repository, defaults)
        if not found:
            raise InvalidModel(
                f"the model repository '{config.model_repository}' holds no model; `convoy export` makes one"
            )
        self._config = config
        self._decoders = ThreadPoolExecutor(repository.available_cpus(), "decode")
        self._metrics = Metrics(CollectorRegistry(), version())
        self.core = Core(found, self._metrics, self._decoders, config.max_image_pixels)
        if config.metrics_aliases == "triton":
            rows = TritonAliases(lambda: [(m.spec.name, m.spec.version, m.statistics, m.queued) for m in self.core])
            self._metrics.registry.register(rows)
        self._health = health.aio.HealthServicer()
        self._access = Access(config, lambda: self._metrics.rejected.labels("", "", "auth").inc())
        configs = {(f.name, f.version): f.config for f in found if f.config is not None}
        dispatcher = Dispatcher(Service(self.core, configs, self._metrics, version()), self._access.guard)
        self._listeners = Listeners(config, self._access, dispatcher, self._health, self._metrics.registry)

    @property
    def grpc_port(self) -> int:
        """What it listens on for gRPC, once started."""
        return self._listeners.grpc_port

    @property
    def http_port(self) -> int:
        """The same for HTTP; -1 for no HTTP."""
        return self._listeners.http_port

    @property
    def metrics_port(self) -> int:
        """The same for metrics."""
        return self._listeners.metrics_port

    @property
    def management_ports(self) -> tuple[int, ...]:
        """The same for management ports of their own: none, gRPC, or gRPC and HTTP."""
        return self._listeners.management_ports

    def reload(self) -> None:
        """Reads certificates and tokens again where their files changed."""
        self._access.refresh()

    async def start(self) -> None:
        """Listens, says NOT_SERVING, loads and warms up every model, then says SERVING.

        Raises:
            OSError: A port is taken.
            InvalidModel: Not one model can be served.
        """
        await self._health.set("", _NOT_SERVING)
        await self._health.set(_SERVICE, _NOT_SERVING)
        for name, _ in self.core.failed:
            await self._health.set(name, _NOT_SERVING)
        await self._listeners.start()
        changes: set[asyncio.Task[None]] = set()

        def changed(model: Model) -> None:
            # By name: one version that is ready is enough, whichever of them is done last.
            name = model.spec.name
            status = _SERVING if self.core.model(name).state == "ready" else _NOT_SERVING
            changes.add(asyncio.ensure_future(self._health.set(name, status)))

        await self.core.load(changed)
        await asyncio.gather(*changes)
        if not self.core.ready:
            reasons = "; ".join(f"{' '.join(n).strip()}: {why}" for n, why in self.core.failed.items())
            raise InvalidModel(f"not one model can be served: {reasons}")
        await self._health.set("", _SERVING)
        await self._health.set(_SERVICE, _SERVING)

    async def stop(self) -> bool:
        """Drains and stops: NOT_SERVING at once, then no new requests, then every answer that is due.

        Returns:
            Whether everything that was admitted got its answer in time.
        """
        notice = self._config.drain_seconds if self.core.ready else 0
        self.core.begin_drain()
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(notice)
        log.info("stopping: %d requests are being answered", sum(m.inflight for m in self.core))
        in_time = await self._listeners.drain(self._config.drain_timeout_seconds)
        await self.core.drain()
        self._decoders.shutdown()
        await self._listeners.stop()
        return in_time


def version() -> str:
    """The version of the installed distribution."""
    return distribution_version("convoy")
