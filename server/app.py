"""The composition root: builds every part of a server, starts it, drains it, stops it."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version as distribution_version
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from server import repository
from server.config import ServeConfig
from server.core import Core
from server.dispatch import SERVICE, Dispatcher
from server.errors import InvalidModel
from server.frontend.local import NOT_SERVING, SERVING, LocalFrontEnd
from server.frontend.processes import FrontEndProcesses
from server.metrics import Metrics, TritonAliases
from server.model import Model
from server.service import Service

log = logging.getLogger(__name__)

_SERVICE = SERVICE.full_name


class App:
    """One server. Made, started and stopped on one event loop.

    Attributes:
        core: Its models.
        grpc_port, metrics_port: What it listens on, once started.
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
        configs = {(f.name, f.version): f.config for f in found if f.config is not None}
        dispatcher: Any = Dispatcher(Service(self.core, configs, self._metrics, version()))
        options = [
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
        ]
        self._front = (
            LocalFrontEnd(dispatcher, options)
            if config.frontends == 1
            else FrontEndProcesses(config.frontends, dispatcher, options)
        )
        self._metrics_server: tuple[WSGIServer, Thread] | None = None
        self.grpc_port = self.metrics_port = 0

    async def start(self) -> None:
        """Listens, says NOT_SERVING, loads and warms up every model, then says SERVING.

        Raises:
            OSError: A port is taken.
            InvalidModel: Not one model can be served.
        """
        config = self._config
        await self._front.set("", NOT_SERVING)
        await self._front.set(_SERVICE, NOT_SERVING)
        for name, _ in self.core.failed:
            await self._front.set(name, NOT_SERVING)
        self.grpc_port = await self._front.start(config.host, config.grpc_port)
        try:
            self._metrics_server = start_http_server(config.metrics_port, config.host, self._metrics.registry)
        except OSError as error:
            raise OSError(
                f"cannot listen on {config.host}:{config.metrics_port} for metrics: {error.strerror}"
            ) from error
        self.metrics_port = self._metrics_server[0].server_port
        changes: set[asyncio.Task[None]] = set()

        def changed(model: Model) -> None:
            # By name: one version that is ready is enough, whichever of them is done last.
            name = model.spec.name
            status = SERVING if self.core.model(name).state == "ready" else NOT_SERVING
            changes.add(asyncio.ensure_future(self._front.set(name, status)))

        await self.core.load(changed)
        await asyncio.gather(*changes)
        if not self.core.ready:
            reasons = "; ".join(f"{' '.join(n).strip()}: {why}" for n, why in self.core.failed.items())
            raise InvalidModel(f"not one model can be served: {reasons}")
        await self._front.set("", SERVING)
        await self._front.set(_SERVICE, SERVING)

    async def stop(self) -> bool:
        """Drains and stops: NOT_SERVING at once, then no new requests, then every answer that is due.

        Returns:
            Whether everything that was admitted got its answer in time.
        """
        notice = self._config.drain_seconds if self.core.ready else 0
        self.core.begin_drain()
        await self._front.not_serving()
        await asyncio.sleep(notice)
        log.info("stopping: %d requests are being answered", sum(m.inflight for m in self.core))
        begun, limit = time.monotonic(), self._config.drain_timeout_seconds
        # Refuses new calls, lets the running handlers finish, and cancels those that outlast the limit.
        await self._front.stop(limit)
        in_time = time.monotonic() - begun < limit
        await self.core.drain()
        self._decoders.shutdown()
        if self._metrics_server is not None:
            server, thread = self._metrics_server
            server.shutdown()
            server.server_close()
            thread.join()
        return in_time


def version() -> str:
    """The version of the installed distribution."""
    return distribution_version("convoy")
