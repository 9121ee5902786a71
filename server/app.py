"""The composition root: builds every part of a server, starts it, drains it, stops it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version as distribution_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grpc_health.v1 import health
from prometheus_client import CollectorRegistry

from convoynet.server import settings
from convoynet.server.config import ServeConfig
from convoynet.server.engines.process import EngineProcess
from convoynet.server.engines.trials import Trials
from convoynet.server.errors import InvalidModel, ServerError, UnknownModel
from convoynet.server.frontend.listeners import Access, Listeners
from convoynet.server.frontend.local import NOT_SERVING, SERVING
from convoynet.server.gpus import visible_gpus
from convoynet.server.host import available_cpus
from convoynet.server.http.page import Page
from convoynet.server.images.image_decoder import gpu_jpeg_decoder
from convoynet.server.memory.budget import Budget
from convoynet.server.memory.shared_memory import Regions
from convoynet.server.models.core import Core
from convoynet.server.models.ensemble import Ensemble
from convoynet.server.models.model import Model, Shared
from convoynet.server.models.plan_builds import PlanBuilds
from convoynet.server.models.servable import Servable
from convoynet.server.models.watcher import Watcher
from convoynet.server.observing import logs
from convoynet.server.observing.gpu_telemetry import GpuTelemetry
from convoynet.server.observing.log_settings import LogSettings
from convoynet.server.observing.metrics import Metrics, TritonAliases
from convoynet.server.observing.observer import Observer
from convoynet.server.observing.trace_settings import TraceOptions, TraceSettings
from convoynet.server.observing.tracing import Tracing
from convoynet.server.protocol.dispatch import SERVICE, Dispatcher
from convoynet.server.protocol.ledger import Ledger
from convoynet.server.protocol.repository_service import RepositoryService
from convoynet.server.protocol.service import Service, ServiceOptions
from convoynet.server.protocol.settings_service import SettingsService
from convoynet.server.protocol.shared_memory_service import SharedMemoryService
from convoynet.server.repository.folder import Folder
from convoynet.server.repository.layout import is_remote
from convoynet.server.repository.lone_files import LoneFiles
from convoynet.server.repository.overlay import remove_leftovers, remove_overlays
from convoynet.server.repository.remote import Remote
from convoynet.server.repository.repository import Repository
from convoynet.server.repository.specs import Defaults
from convoynet.server.scheduling.response_cache import ResponseCache
from convoynet.server.scheduling.turnstile import Turnstile
from convoynet.server.spec import Limits, ModelSpec
from convoynet.server.supervision import tasks
from convoynet.server.supervision.threads import SECONDS

log = logging.getLogger(__name__)

EXTENSIONS = (
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "cuda_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)
"""Of the protocol, in Triton's order and words; those that this server has."""
_END_SECONDS = 10.0
"""What the end of one part of a server may take once everything was answered."""
_SERVICE = SERVICE.full_name
_ALIVE = health.SERVICE_NAME
"""The service whose health says that the server answers, whatever its models do: for liveness probes."""


class App:
    """One server. Made, started and stopped on one event loop.

    Attributes:
        core: Its models.
        traces: Which requests are traced, with --otlp-endpoint; clients may change it.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._decoders = ThreadPoolExecutor(available_cpus(), "decode")
        self._metrics = Metrics(CollectorRegistry(), version())
        trials = Trials()
        self._repository = _repository(config, trials)
        refused, cache = self._metrics.rejected.labels("", "", "memory").inc, config.response_cache_bytes
        self._budget = Budget(config.max_inflight_bytes, refused, other=cache)
        self._shared = Shared(
            metrics=self._metrics,
            decoders=self._decoders,
            max_pixels=config.max_image_pixels,
            turnstile=Turnstile(available_cpus()),
            cache=ResponseCache(config.response_cache_bytes) if config.response_cache_bytes else None,
            builds=PlanBuilds(config.engine_cache.expanduser()),
            trials=trials,
            jpeg=gpu_jpeg_decoder(config.image_decoder),
            changed=self._changed,
            budget=self._budget,
            frontends=config.frontend_count if config.tune_in_service else 0,
        )
        self.core = Core(self._repository, self._make, config.model_control_mode, self._changed)
        self._metrics.failed = lambda: self.core.failed
        self._health_changes: set[asyncio.Task[None]] = set()
        self._background: list[asyncio.Task[None]] = []
        aliases = config.metrics_aliases == "triton"
        self._gpus = GpuTelemetry(self._metrics.registry, aliases=aliases)
        if aliases:
            rows = TritonAliases(lambda: [(m.spec.name, m.spec.version, m.statistics, m.queued) for m in self.core])
            self._metrics.registry.register(rows)
        self._access = Access(config, lambda: self._metrics.rejected.labels("", "", "auth").inc())
        self.traces = TraceSettings(_traced(config))
        self._logs = LogSettings()
        regions = Regions() if config.allow_client_shm else None
        options = ServiceOptions(version(), _extensions(config), regions)
        ledger = Ledger(self.core, self._metrics)
        services = (
            Service(self.core, options),
            RepositoryService(self.core),
            SharedMemoryService(regions),
            SettingsService(self.core, self.traces, self._logs),
        )
        self._dispatcher = Dispatcher(
            services,
            guard=self._access.guard,
            triton_compat=config.triton_compat,
            budget=self._budget,
            counted=ledger.over,
            largest=config.max_message_bytes,
        )
        self._tracing = Tracing(config.otlp_endpoint, version(), self.traces) if config.otlp_endpoint else None
        self._observe()
        page = Page(self.core, self._metrics, version(), self._repository.threads).routes if config.page else {}
        self._listeners = Listeners(config, self._access, self._dispatcher, ledger.over, self._metrics.registry, page)
        self._metrics.frontends.set_function(lambda: self._listeners.frontends)
        self.core.reachable = lambda: self._listeners.frontends > 0

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

    @property
    def drain_limit_seconds(self) -> float:
        """What the drain may take, by the settings of now."""
        return self._config.drain_seconds + self._config.drain_timeout_seconds

    async def start(self) -> None:
        """Listens, says NOT_SERVING, loads and warms up every model, then says SERVING.

        Raises:
            OSError: A port is taken.
            InvalidModel: Not one model can be served.
        """
        config = self._config
        await self._listeners.set_health("", NOT_SERVING)
        await self._listeners.set_health(_SERVICE, NOT_SERVING)
        await self._listeners.set_health(_ALIVE, SERVING)
        await self._listeners.start()
        self._gpus.start()
        if left := await self._repository.threads.run(SECONDS, remove_leftovers):
            log.info("removed what load requests of %d servers left that were killed", left)
        await self.core.start(config.load_model, config.start_patience_seconds)
        await asyncio.gather(*self._health_changes)
        if config.model_control_mode == "none" and not self.core.ready:
            reasons = "; ".join(f"{' '.join(n).strip()}: {why}" for n, why in self.core.failed.items())
            raise InvalidModel(
                f"not one model can be served: {reasons or 'the repository holds no model; `convoy export` makes one'}"
            )
        if config.model_control_mode == "poll":
            watcher = Watcher(self._repository, self.core, config.repository_poll_secs)
            self._background.append(tasks.keep(watcher.run, "the watch over the model repository"))
        self._background.append(tasks.keep(self._budget.keep_tidy, "giving memory back"))
        for service in ("", _SERVICE):
            await self._listeners.set_health(service, SERVING if self.core.ready else NOT_SERVING)

    def _make(self, spec: ModelSpec) -> Servable:
        if spec.steps:
            return Ensemble(spec, self.core, self._metrics)
        return Model(spec, self._shared)

    def _changed(self, name: str) -> None:
        """Tells health of a model. By name: one version that is ready is enough."""
        try:
            ready = self.core.model(name).state == "ready"
        except UnknownModel:
            ready = False
            self._metrics.forget(name)
        except ServerError:
            ready = False
        for service, serves in ((name, ready), ("", self.core.ready), (_SERVICE, self.core.ready)):
            status = SERVING if serves else NOT_SERVING
            change = tasks.start(self._listeners.set_health(service, status), "a change of health")
            self._health_changes.add(change)
            change.add_done_callback(self._health_changes.discard)

    async def stop(self) -> bool:
        """Drains and stops: NOT_SERVING at once, then no new requests, then every answer that is due.

        Returns:
            Whether everything that was admitted got its answer in time.
        """
        for task in self._background:
            task.cancel()
        notice = self._config.drain_seconds if self.core.ready else 0
        self.core.begin_drain()
        await self._listeners.not_serving()
        await asyncio.sleep(notice)
        log.info("stopping: %d requests are being answered", sum(m.inflight for m in self.core))
        in_time = await self._listeners.drain(self._config.drain_timeout_seconds)
        # Nobody waits for an answer any more: what does not end by itself now never will.
        in_time &= await self._within("models", self.core.drain())
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._gpus.close()
        in_time &= await self._within("ports", self._listeners.stop())
        if self._tracing is not None:
            await self._within("traces", self._repository.threads.run(_END_SECONDS, self._tracing.close))
        remove_overlays()
        self._logs.close()
        return in_time

    async def _within(self, what: str, ending: Coroutine[Any, Any, None]) -> bool:
        """Whether something has ended in time; otherwise it is left behind, which is logged."""
        task = tasks.start(ending, f"the end of the {what}")
        if (await asyncio.wait([task], timeout=_END_SECONDS))[0]:
            return True
        log.error("stopping: the %s have not ended within %g s and are left", what, _END_SECONDS)
        task.cancel()
        return False

    async def reload(self, config: ServeConfig) -> None:
        """Takes over the settings that can change while serving; one log line names those that need a restart."""
        live, fixed = settings.changes(self._config, config)
        self._config = replace(self._config, **live)
        logs.configure(self._config.log_level, self._config.log_format)
        self._logs.reset()
        self.traces.reset(_traced(self._config))
        self._observe()
        self._shared.max_pixels = self._config.max_image_pixels
        await self._repository.threads.run(SECONDS, self._access.refresh)
        await self.core.refresh()
        log.info("reloaded: %s", ", ".join(live) or "no setting has changed")
        if fixed:
            log.warning("a restart is needed for the new values of %s", ", ".join(fixed))

    def _observe(self) -> None:
        """Attaches what the settings of now want to see calls. Traces first: they may give a call its trace id."""
        observers: list[Observer] = []
        if self._tracing is not None:
            observers.append(self._tracing)
        if self._config.log_requests:
            observers.append(logs.AccessLog())
        self._dispatcher.observers = observers


def _extensions(config: ServeConfig) -> tuple[str, ...]:
    """Those of EXTENSIONS that these settings and this machine leave."""
    missing = set() if config.allow_client_shm else {"system_shared_memory", "cuda_shared_memory"}
    if not (visible_gpus() and find_spec("cuda")):
        missing.add("cuda_shared_memory")
    return tuple(extension for extension in EXTENSIONS if extension not in missing)


def _traced(config: ServeConfig) -> TraceOptions:
    level = "TIMESTAMPS" if config.otlp_endpoint else "OFF"
    return TraceOptions(level, config.trace_rate)


def _repository(config: ServeConfig, trials: Trials) -> Repository:
    cache = config.model_cache.expanduser()
    sources: list[Folder] = [
        Remote(r, cache, seconds=config.load_timeout_seconds, most_bytes=config.model_cache_bytes)
        if is_remote(r)
        else Folder(Path(r), config.model_name)
        for r in config.model_repository
    ]
    sources += [LoneFiles(Path(f), config.model_name, config.preprocessing, config.labels) for f in config.onnx]
    limits = Limits(config.engine_timeout_seconds, load_s=config.load_timeout_seconds)
    defaults = Defaults(
        config.max_queue,
        config.threads,
        config.default_max_batch_size,
        config.strict_model_config,
        config.require_report,
        config.latency_slo,
        # Somebody who names another number of threads has chosen.
        config.tune and config.threads == available_cpus(),
        limits,
    )
    return Repository(sources, defaults, partial(EngineProcess.describe, limits=limits), trials)


def version() -> str:
    """The version of the installed distribution."""
    return distribution_version("convoynet")
