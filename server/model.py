"""One version of one model while it is served: its queue, its engine threads and its numbers."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Executor
from typing import Literal

import numpy as np

from server.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidModel,
    ModelNotReady,
    QueueFull,
    ServerError,
)
from server.metrics import Metrics, ModelMetrics
from server.queue import BatchQueue, Entry
from server.spec import ModelSpec
from server.statistics import Statistics
from server.types import InferRequest, InferResult, Tensor, Timings
from server.worker import Batch, Worker

log = logging.getLogger(__name__)

_FAILURES: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((asyncio.CancelledError,), "CANCELED"),
    ((QueueFull, Draining, DeadlineExceeded), "REJECTED"),
    ((EngineFailed,), "BACKEND"),
)
"""Triton's kinds of failed requests; every other error is OTHER."""

State = Literal["loading", "ready", "failed", "draining"]


class Model:
    """Lives on the event loop; only its workers' threads run the engine.

    Attributes:
        spec: What it is.
        state: Where it stands.
        reason: Why it failed, for people; "" otherwise.
        device: Where its engine runs, once it is ready.
        statistics: Its totals.
        max_pixels: The largest encoded image that it takes.
    """

    def __init__(self, spec: ModelSpec, metrics: Metrics, decoders: Executor, max_pixels: int) -> None:
        self.spec = spec
        self.state: State = "loading"
        self.reason = ""
        self.device = ""
        self.statistics = Statistics()
        self._queue = BatchQueue(spec.batch)
        self._inflight = 0
        self._metrics = ModelMetrics(metrics, (spec.name, spec.version), self._queue.__len__, lambda: self._inflight)
        self._decoders = decoders
        self.max_pixels = max_pixels
        self._workers: list[Worker] = []
        self._metrics.set_state(self.state)

    @property
    def queued(self) -> int:
        """Requests admitted and not yet running."""
        return len(self._queue)

    @property
    def inflight(self) -> int:
        """Requests being worked on, queued ones included."""
        return self._inflight

    async def load(self) -> None:
        """Loads the engines and warms them up; ends in state ready or failed and never raises for a faulty model."""
        started = time.perf_counter()
        self._workers = [Worker(self.spec, self._queue, self._deliver, i) for i in range(self.spec.instances)]
        for worker in self._workers:
            worker.start()
        outcomes = await asyncio.gather(*(w.ready for w in self._workers), return_exceptions=True)
        broken = next((o for o in outcomes if isinstance(o, BaseException)), None)
        if broken is not None:
            self._queue.close()
            self.reason = str(broken) if isinstance(broken, InvalidModel) else type(broken).__name__
            self._enter("failed")
            log.error("model %s version %s cannot be served: %s", self.spec.name, self.spec.version, self.reason)
            return
        seconds = time.perf_counter() - started
        loading = max(w.load_seconds for w in self._workers)
        self.device = str(outcomes[0])
        self._metrics.loaded(seconds)
        self._enter("ready")
        log.info(
            "model %s version %s is ready on %s after %.2f s of loading and %.2f s of warm-up",
            self.spec.name, self.spec.version, self.device, loading, seconds - loading,
        )  # fmt: skip

    async def drain(self) -> None:
        """Admits nothing more and waits until everything admitted was answered."""
        if self.state == "ready":
            self._enter("draining")
        self._queue.close()
        await asyncio.gather(*(w.stopped for w in self._workers))

    async def infer(self, request: InferRequest) -> InferResult:
        """Answers one request: check, admission, decode, queue, batch.

        Raises:
            InvalidRequest: It does not fit the model, or an image in it cannot be decoded.
            ModelNotReady, QueueFull, Draining: It was not admitted.
            DeadlineExceeded: Its time ran out.
            EngineFailed: The engine raised.
            asyncio.CancelledError: The client went away.
        """
        timings = Timings()
        self._inflight += 1
        try:
            return await self._infer(request, timings)
        except (ServerError, asyncio.CancelledError) as error:
            self._count_failure(error, request, timings)
            raise
        finally:
            self._inflight -= 1

    async def _infer(self, request: InferRequest, timings: Timings) -> InferResult:
        if self.state in ("loading", "failed"):
            raise ModelNotReady(f"model '{self.spec.name}' version {self.spec.version} is {self.state}")
        rows = self.spec.check(request)
        self._queue.reserve()
        try:
            inputs = await self._decode(request) if self.spec.is_encoded(request) else request.inputs
            if request.deadline is not None and time.monotonic() >= request.deadline:
                raise DeadlineExceeded
        except BaseException:
            self._queue.release()
            raise
        outputs = frozenset(output.name for output in request.outputs)
        entry = Entry(inputs, rows, asyncio.get_running_loop().create_future(), timings, outputs)
        self._queue.put(entry)
        answer = await self._answer(entry, request.deadline)
        return InferResult(self.spec.name, self.spec.version, answer, timings, rows)

    async def _answer(self, entry: Entry, deadline: float | None) -> dict[str, Tensor]:
        """Waits for the entry's answer, at most until its deadline."""
        timer = None
        if deadline is not None:
            timer = asyncio.get_running_loop().call_later(deadline - time.monotonic(), _expire, entry)
        try:
            return await entry.result
        except (DeadlineExceeded, asyncio.CancelledError):
            self._queue.discard(entry)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    async def _decode(self, request: InferRequest) -> dict[str, Tensor]:
        """The images of a request as one tensor, decoded in the pool of decoder threads."""
        image, name = self.spec.image, self.spec.inputs[0].name
        if image is None:
            raise AssertionError("only a model with an image input has encoded requests")
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(self._decoders, image.decode, data, self.max_pixels)
            for data in request.inputs[name].ravel().tolist()
        ]
        try:
            rows = await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()
        batch = np.ascontiguousarray(rows[0])[None] if len(rows) == 1 else np.stack(rows)
        self._metrics.decode.observe(time.perf_counter() - started)
        return {name: batch}

    def _deliver(self, batch: Batch) -> None:
        """Hands each entry its own answer. Those whose client went away meanwhile are left out."""
        first = batch.entries[0].timings
        if batch.error is not None:
            for entry in batch.entries:
                if not entry.result.done():
                    entry.result.set_exception(batch.error)
            return
        self.statistics.add_batch(batch.rows, first)
        self._metrics.batch(batch.rows)
        for entry, answer in zip(batch.entries, batch.answers, strict=True):
            if not entry.result.done():
                entry.result.set_result(answer)
                self.statistics.add_success(entry.timings, entry.rows)
                self._metrics.success(entry.timings, entry.rows)

    def _count_failure(self, error: BaseException, request: InferRequest, timings: Timings) -> None:
        if isinstance(error, asyncio.CancelledError):
            expired = request.deadline is not None and time.monotonic() >= request.deadline
            reason: str | None = "deadline" if expired else "cancelled"
        else:
            reason = getattr(error, "rejected", None)
        if reason is not None:
            self._metrics.rejected(reason)
        kind = next((name for types, name in _FAILURES if isinstance(error, types)), "OTHER")
        self.statistics.add_failure(timings, kind)

    def _enter(self, state: State) -> None:
        self.state = state
        self._metrics.set_state(state)


def _expire(entry: Entry) -> None:
    if not entry.result.done():
        entry.result.set_exception(DeadlineExceeded())
