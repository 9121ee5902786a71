"""One version of one model while it is served: admission, queue, instances, answers and numbers."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from convoynet.server.datatypes import held_bytes
from convoynet.server.engines.trials import Trials
from convoynet.server.errors import LOADING_S, InvalidModel, ModelNotReady
from convoynet.server.images.image_decoder import JpegDecoder
from convoynet.server.memory.budget import Budget
from convoynet.server.models.examination import examine
from convoynet.server.models.instance import Batch, Instance, Told
from convoynet.server.models.plan_builds import PlanBuilds
from convoynet.server.models.servable import State
from convoynet.server.models.tuning import tune
from convoynet.server.observing.metrics import Levels, Metrics, ModelMetrics
from convoynet.server.observing.statistics import Statistics
from convoynet.server.scheduling.admission import Limiter
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.expiry import Expiry
from convoynet.server.scheduling.response_cache import ResponseCache
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.scheduling.turnstile import Turnstile
from convoynet.server.spec import ModelSpec
from convoynet.server.types import InferRequest, InferResult, Tensor, Timings

log = logging.getLogger(__name__)


@dataclass
class Shared:
    """What all models of a server use together.

    Attributes:
        metrics: Where they count.
        decoders: Threads that decode images.
        max_pixels: The largest encoded image.
        turnstile: Where models that share the CPU take turns.
        cache: Answers of the models whose config asks for it; None without a cache.
        builds: Where plans are built that the repository leaves to the server.
        trials: Where models are tried before they are served.
        jpeg: Decodes JPEGs on the GPU; None for the CPU's decoder.
        changed: Called with the name of a model that has lost its last engine, or has one again.
        budget: What images count for while they are decoded.
        frontends: How many are busy while engines are measured; 0 to measure engines alone.
        tuning: Held by the model whose engines are measured.
    """

    metrics: Metrics
    decoders: Executor
    max_pixels: int
    turnstile: Turnstile
    cache: ResponseCache | None
    builds: PlanBuilds
    trials: Trials
    jpeg: JpegDecoder | None = None
    changed: Callable[[str], None] = lambda name: None
    budget: Budget = field(default_factory=Budget)
    frontends: int = 0
    tuning: asyncio.Lock = field(default_factory=asyncio.Lock)


class Model:
    """Lives on the event loop; its engines run in processes of their own.

    Attributes:
        runs, depth: Those of a model that is no ensemble.
        spec: What it is.
        statistics: Its totals.
    """

    runs, depth = 1, 0

    def __init__(self, spec: ModelSpec, shared: Shared) -> None:
        self.spec = spec
        self._state: State = "loading"
        self._reason = ""
        self._down = ""
        """Why it has no engine; "" where one is there, or on its way."""
        self.statistics = Statistics()
        self._shared = shared
        self._scheduler = Scheduler(spec.batch)
        objective = spec.batch.latency_slo_s
        self._limiter = Limiter(objective, spec.batch.max_queue) if objective else None
        self._cache = (
            shared.cache.model(spec.name, spec.version) if shared.cache is not None and spec.response_cache else None
        )
        self._inflight = 0
        self._metrics = ModelMetrics(
            shared.metrics,
            (spec.name, spec.version),
            Levels(
                depth=self._scheduler.__len__,
                inflight=lambda: self._inflight,
                inflight_rows=lambda: self._scheduler.rows + self._scheduler.running.rows,
                engine_rows=self._engine_rows,
                queue_bytes=lambda: self._scheduler.nbytes,
                limit=lambda: self._limiter.limit if self._limiter else 0,
            ),
        )
        self._metrics.objective.set(objective)
        self._metrics.queue_limit.set(self._scheduler.most_queued)
        self._told: dict[str, str] = {}
        self._starting: asyncio.Task[None] | None = None
        self._instances: list[Instance] = []
        self._metrics.set_state(self._state)

    @property
    def state(self) -> State:
        """Where it stands; failed also while every one of its engines is lost and does not start again."""
        return "failed" if self._state == "ready" and self._down else self._state

    @property
    def reason(self) -> str:
        """Why it failed, for people; "" otherwise."""
        return self._reason or (self._down if self._state == "ready" else "")

    @property
    def queued(self) -> int:
        """Requests admitted and not yet running."""
        return len(self._scheduler)

    @property
    def inflight(self) -> int:
        """Requests being worked on, queued ones included."""
        return self._inflight

    @property
    def info(self) -> dict[str, str]:
        """What runs it and how that was chosen, by name, for people."""
        if not self._instances or self._state == "failed":
            return {}
        engine = self._instances[0].engine
        devices = "; ".join(dict.fromkeys(instance.engine.device for instance in self._instances))
        return {"device": devices, "instances": str(len(self._instances)), **engine.info, **self._told}

    @property
    def labels(self) -> tuple[str, str]:
        """Name and version of its series; empty once they are gone."""
        return self._metrics.labels

    def count(self, timings: Timings, rows: int, error: BaseException | None, *, late: bool) -> None:
        """Counts one request (convoynet.server.types.Counting)."""
        self._metrics.over(self.statistics, timings, rows, error, late=late)

    async def load(self) -> None:
        """Loads the engines and warms them up; ends in state ready or failed and never raises for a faulty model."""
        started = time.perf_counter()
        self._starting = asyncio.ensure_future(self._start())
        await asyncio.wait([self._starting])
        stopped = InvalidModel("its load was stopped")
        broken = stopped if self._starting.cancelled() else self._starting.exception()
        if broken is not None:
            await self._stop()
            if not isinstance(broken, InvalidModel):
                log.error("model %s version %s: loading failed", self.spec.name, self.spec.version, exc_info=broken)
            self._reason = str(broken) if isinstance(broken, InvalidModel) else "loading failed (see the log)"
            self._enter("failed")
            log.error("model %s version %s cannot be served: %s", self.spec.name, self.spec.version, self._reason)
            return
        seconds = time.perf_counter() - started
        engine = self._instances[0].engine
        self._metrics.loaded(seconds)
        self._enter("ready")
        if cold := engine.info.get("warm_up"):
            log.warning("model %s version %s is not warmed up: %s", self.spec.name, self.spec.version, cold)
        log.info(
            "model %s version %s is ready on %s after %.2f s, %.2f s of it loading the file",
            self.spec.name, self.spec.version, engine.device, seconds, engine.load_seconds,
        )  # fmt: skip

    def _engine_rows(self) -> int:
        """Rows that the engines which are up take at once, if it is ready."""
        up = sum(instance.is_up for instance in self._instances) if self._state == "ready" else 0
        return up * self.spec.engine.slots * max(self.spec.batch.max_rows, 1)

    def abandon(self) -> None:
        """Ends the load, where it is under way; it fails."""
        if self._starting is not None:
            self._starting.cancel()

    async def _start(self) -> None:
        """Starts every instance; raises what the first of them failed with."""
        if self.spec.engine.plan is not None and self.spec.engine.plan.build is not None:
            self.spec = replace(self.spec, engine=await self._shared.builds.built(self.spec))
        examined = await examine(self.spec, self._shared.trials)
        self.spec, self._told = examined.spec, dict(examined.told)
        if not examined.together:
            self._scheduler.run_alone()
        if not self.spec.instances:
            tuned = await tune(self.spec, frontends=self._shared.frontends, turn=self._shared.tuning)
            engine = replace(self.spec.engine, threads=tuned.threads, engine=tuned.engine)
            self.spec = replace(self.spec, instances=tuned.instances, engine=engine)
            self._told["tuning"] = tuned.to_json()
        self._scheduler.running.use_instances(self.spec.instances * self.spec.engine.slots)
        told = Told(self._deliver, self._metrics.restarts.inc, self._metrics.hangs.inc, self._changed)
        self._instances = [
            Instance(spec, self._scheduler, self._shared.turnstile, told) for spec in self.spec.of_instances()
        ]
        outcomes = await asyncio.gather(*(i.start() for i in self._instances), return_exceptions=True)
        broken = next((o for o in outcomes if isinstance(o, BaseException)), None)
        if broken is not None:
            raise broken
        if buckets := self._instances[0].engine.buckets:
            self._scheduler.use_buckets(buckets)

    def _changed(self) -> None:
        """An engine is gone for longer, or is back."""
        self._down = self._instances[0].down if all(one.down for one in self._instances) else ""
        if self._state not in ("ready", "draining"):
            return
        if self._down:
            self._scheduler.refuse(ModelNotReady(f"model '{self.spec.name}' is not ready: {self._down}"))
        self._shared.changed(self.spec.name)

    async def drain(self) -> None:
        """Admits nothing more, waits until everything admitted was answered, then frees what the model held."""
        if self._state == "ready":
            self._enter("draining")
        await self._stop()
        if self._state != "failed":
            self._metrics.remove()

    async def infer(self, request: InferRequest) -> InferResult:
        """Answers one request: check, admission, decode, queue, batch. Admitted or refused before it waits.

        Raises:
            InvalidRequest: It does not fit the model, or an image in it cannot be decoded.
            ModelNotReady, QueueFull, Draining: It was not admitted.
            DeadlineExceeded: Its time ran out, or would.
            EngineFailed, EngineLost: The engine raised, or died.
            asyncio.CancelledError: The client went away.
        """
        timings = Timings()
        self._inflight += 1
        try:
            if self._state != "ready" or self._down:
                self._refuse()
            fits = request.fits
            rows = fits[1] if fits is not None and fits[0] is self.spec else self.spec.check(request)
            outputs = frozenset([output.name for output in request.outputs])
            found = await (self._run if self._cache is None else self._cached)(request, rows, outputs, timings)
            return InferResult(self.spec.name, self.spec.version, found, timings, rows)
        finally:
            self._inflight -= 1

    def _refuse(self) -> None:
        """Refuses a request where there is no engine for it; one that is draining the scheduler refuses."""
        if self.state in ("loading", "failed"):
            why = f": {self.reason}" if self._state == "ready" else ""
            retry_s = LOADING_S if self.state == "loading" else None
            raise ModelNotReady(f"model '{self.spec.name}' version {self.spec.version} is {self.state}{why}", retry_s)

    async def _cached(
        self, request: InferRequest, rows: int, outputs: frozenset[str], timings: Timings
    ) -> dict[str, Tensor]:
        """The answer of an equal request before, or a new one."""
        if self._cache is None:
            raise AssertionError("only a model with a cache asks it")
        begun = time.perf_counter_ns()
        key = self._cache.key(request.inputs, outputs)
        found = self._cache.get(key)
        timings.looked_up = (now := time.perf_counter_ns()) - begun
        if found is not None:
            timings.hit = True
            timings.queued = timings.started = timings.input_ready = timings.infer_done = now
            self._metrics.cache_hits.inc()
            return found
        self._metrics.cache_misses.inc()
        self.statistics.cache_miss.add(timings.looked_up)
        found = await self._run(request, rows, outputs, timings)
        begun = time.perf_counter_ns()
        self._cache.put(key, found)
        self.statistics.cache_miss.add(time.perf_counter_ns() - begun, 0)
        return found

    async def _run(
        self, request: InferRequest, rows: int, outputs: frozenset[str], timings: Timings
    ) -> dict[str, Tensor]:
        loop = asyncio.get_running_loop()
        encoded = self.spec.is_encoded(request)
        entry = Entry(
            rows,
            sum(map(held_bytes, request.inputs.values())) + (rows * self.spec.row_bytes if encoded else 0),
            loop.create_future(),
            timings,
            outputs,
            request.priority,
            request.deadline,
            request.timeout_us / 1e6,
        )
        others, admitted = self._inflight - 1, 0.0
        if self._limiter is not None:
            admitted = time.monotonic()
            self._limiter.admit(others, self._scheduler.predict(rows, request.priority))
        self._scheduler.admit(entry)
        timer = decoding = None
        if entry.expires != math.inf:
            timer = Expiry(entry)
        try:
            if encoded:
                decoding = asyncio.ensure_future(self._decode(request))
                decoding.add_done_callback(partial(self._decoded, entry))
            else:
                self._scheduler.put(entry, request.inputs)
            answer = await entry.result
            if self._limiter is not None:
                now = time.monotonic()
                self._limiter.observe(others, now - admitted, now)
            return answer
        finally:
            if timer is not None:
                timer.cancel()
            if decoding is not None:
                decoding.cancel()
            self._scheduler.discard(entry)

    async def _decode(self, request: InferRequest) -> dict[str, Tensor]:
        """The images of a request as one tensor, decoded in the pool of decoder threads."""
        image, name, shared = self.spec.image, self.spec.inputs[0].name, self._shared
        if image is None:
            raise AssertionError("only a model with an image input has encoded requests")
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(
                shared.decoders, image.decode, data, shared.max_pixels, shared.jpeg, shared.budget.holding
            )
            for data in request.inputs[name].ravel().tolist()
        ]
        try:
            rows = await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()
        batch = rows[0][None] if len(rows) == 1 else np.stack(rows)
        self._metrics.decode.observe(time.perf_counter() - started)
        return {**request.inputs, name: batch}

    def _decoded(self, entry: Entry, decoding: asyncio.Future[dict[str, Tensor]]) -> None:
        """Queues an entry whose images are decoded, or says why they are not."""
        if decoding.cancelled():
            return
        error = decoding.exception()
        if error is None:
            self._scheduler.put(entry, decoding.result())
        elif not entry.result.done():
            entry.result.set_exception(error)

    def _deliver(self, batch: Batch) -> None:
        """Hands each entry its own answer. Those whose client went away meanwhile are left out."""
        if batch.error is not None:
            for entry in batch.entries:
                if not entry.result.done():
                    entry.result.set_exception(copy(batch.error))  # whose traceback holds no other's request
            return
        self.statistics.add_batch(batch.rows, batch.entries[0].timings)
        self._metrics.batch(batch.rows)
        self._metrics.padding.inc(batch.padded - batch.rows)
        for entry, answer in zip(batch.entries, batch.answers, strict=True):
            if not entry.result.done():
                wanted = entry.outputs
                entry.result.set_result({n: t for n, t in answer.items() if n in wanted} if wanted else answer)

    async def _stop(self) -> None:
        self._scheduler.close()
        await asyncio.gather(*(instance.stopped() for instance in self._instances))
        if self._cache is not None:
            self._cache.close()

    def _enter(self, state: State) -> None:
        self._state = state
        self._metrics.set_state(state)
