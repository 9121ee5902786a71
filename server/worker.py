"""The thread that owns one engine: it takes batches, runs them and hands the answers back to the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from server import engines
from server.engines.base import Engine, EngineSpec
from server.errors import EngineFailed, InvalidModel
from server.queue import BatchQueue, Entry
from server.spec import ModelSpec
from server.types import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that ran: its entries with the rows of the answer that are theirs, or the error that it ended with."""

    entries: list[Entry]
    rows: int
    answers: list[dict[str, Tensor]]
    error: EngineFailed | None = None


class Worker(threading.Thread):
    """Loads one engine, warms it up, then runs batches until the queue is closed and empty."""

    def __init__(self, spec: ModelSpec, queue: BatchQueue, deliver: Callable[[Batch], None], index: int) -> None:
        super().__init__(name=f"engine {spec.name}/{spec.version}#{index}", daemon=True)
        self._spec = spec
        self._queue = queue
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._buffers: dict[str, Tensor] = {}
        self.ready: asyncio.Future[str] = self._loop.create_future()
        """Resolves to the engine's device when the warm-up is over; raises InvalidModel."""
        self.stopped: asyncio.Future[None] = self._loop.create_future()
        self.load_seconds = 0.0
        """How long the engine took to load, without its warm-up."""

    def run(self) -> None:
        """The thread's life; not to be called directly."""
        try:
            engine = self._load()
        except InvalidModel as error:
            self._call(_fail, self.ready, error)
        except Exception as error:
            log.exception("model %s version %s: loading failed", self._spec.name, self._spec.version)
            self._call(_fail, self.ready, InvalidModel(f"loading failed: {type(error).__name__} (see the log)"))
        else:
            self._call(_set, self.ready, engine.device)
            while (entries := self._queue.take()) is not None:
                self._call(self._deliver, self._execute(engine, entries))
            engine.close()
        self._call(_set, self.stopped, None)

    def _load(self) -> Engine:
        begun = time.perf_counter()
        loaded = engines.load(EngineSpec.of(self._spec))
        self.load_seconds = time.perf_counter() - begun
        return loaded.engine

    def _execute(self, engine: Engine, entries: list[Entry]) -> Batch:
        rows = sum(e.rows for e in entries)
        started = time.perf_counter_ns()
        for entry in entries:
            entry.timings.started = started
        try:
            inputs = self._gather(entries, rows)
            ready = time.perf_counter_ns()
            # What an engine gives is its own until the next run.
            outputs = {name: values.copy() for name, values in engine.run(inputs, _wanted(entries)).items()}
            done = time.perf_counter_ns()
        except Exception:
            log.exception("model %s version %s: a batch of %d failed", self._spec.name, self._spec.version, rows)
            return Batch(entries, rows, [], EngineFailed(f"model '{self._spec.name}' failed to run the batch"))
        for entry in entries:
            entry.timings.input_ready, entry.timings.infer_done = ready, done
        return Batch(entries, rows, _split(outputs, entries))

    def _gather(self, entries: list[Entry], rows: int) -> dict[str, Tensor]:
        """The inputs of all entries as one batch, in buffers that are used again and again."""
        if len(entries) == 1:
            return {name: np.ascontiguousarray(t) for name, t in entries[0].inputs.items()}
        batch = {}
        for name, first in entries[0].inputs.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape[1:] != first.shape[1:]:
                buffer = np.empty((self._spec.batch.max_rows, *first.shape[1:]), first.dtype)
                self._buffers[name] = buffer
            batch[name] = np.concatenate([e.inputs[name] for e in entries], out=buffer[:rows])
        return batch

    def _call(self, function: Callable[..., None], *args: object) -> None:
        self._loop.call_soon_threadsafe(function, *args)


def _wanted(entries: list[Entry]) -> frozenset[str]:
    """The outputs that one entry or another asks for; empty, which is all, where one of them asks for all."""
    if all(entry.outputs for entry in entries):
        return frozenset().union(*(entry.outputs for entry in entries))
    return frozenset()


def _split(outputs: dict[str, Tensor], entries: list[Entry]) -> list[dict[str, Tensor]]:
    """Gives each entry the rows of the answer that are its own, of the outputs that it asked for."""
    if len(entries) == 1:
        return [outputs]
    answers, start = [], 0
    for entry in entries:
        rows = slice(start, start + entry.rows)
        answers.append({n: t[rows] for n, t in outputs.items() if not entry.outputs or n in entry.outputs})
        start += entry.rows
    return answers


def _set(future: asyncio.Future[object], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[object], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
