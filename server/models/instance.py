"""One engine of a model: takes batches from the scheduler, runs them, and starts again when its process dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from convoynet.server.engines.place import BatchResult
from convoynet.server.engines.process import EngineProcess
from convoynet.server.errors import EngineFailed, EngineLost, InvalidModel, RowsDiffer, ServerError
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.scheduling.turnstile import Turnstile
from convoynet.server.spec import ModelSpec
from convoynet.server.supervision import tasks
from convoynet.server.types import Tensor

log = logging.getLogger(__name__)

_DOWN_SECONDS = 10.0
"""After so long without an engine it is said that there is none."""
_STEADY_SECONDS = 10.0
"""An engine that lived so long is started again at once when it dies; one that died young after a longer pause."""
_QUIET_TURNS = 4
"""Measured with benchmarks/frontends.py: a tenth to a fifth more requests/s at 32 in flight, as many at 1."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that ran: its entries with the rows of the answer that are theirs, or the error that it ended with."""

    entries: list[Entry]
    rows: int
    padded: int
    answers: list[dict[str, Tensor]]
    error: ServerError | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """Whom an instance tells what.

    Attributes:
        batch: Called with each batch that ran, or failed.
        restarted: Called when a lost engine has been replaced.
        hung: Called when an engine was ended since it did not answer.
        changed: Called when `down` has changed.
    """

    batch: Callable[[Batch], None]
    restarted: Callable[[], None]
    hung: Callable[[], None]
    changed: Callable[[], None]


class Instance:
    """Lives on the event loop, as a task of its own from start() until the scheduler is closed and empty.

    Attributes:
        down: Why there is no engine, where one was lost and does not start again; "" otherwise.
    """

    def __init__(
        self,
        spec: ModelSpec,
        scheduler: Scheduler,
        turnstile: Turnstile,
        told: Told,
    ) -> None:
        self._spec = spec
        self._scheduler = scheduler
        self._turnstile = turnstile
        self._told = told
        self._pauses = tasks.Pauses(longest=3.0)
        self.down = ""
        self._engine: EngineProcess | None = None
        self._running: set[asyncio.Task[None] | None] = set()
        self._life: asyncio.Task[None] | None = None

    @property
    def engine(self) -> EngineProcess:
        """The engine that serves now, or the last one that did."""
        if self._engine is None:
            raise AssertionError("start() comes first")
        return self._engine

    @property
    def is_up(self) -> bool:
        """Whether an engine is there that can run a batch."""
        return self._engine is not None and not self._engine.lost.done()

    async def start(self) -> None:
        """Loads the engine and begins to serve.

        Raises:
            InvalidModel: It does not take the model.
            OSError: The system has no room for its process.
        """
        self._engine = await EngineProcess.start(self._spec)
        self._life = tasks.start(self._live(), f"instance of {self._spec.name}/{self._spec.version}")

    async def stopped(self) -> None:
        """Waits until everything in the scheduler was served and the engine has ended."""
        if self._life is not None:
            await asyncio.wait([self._life])

    async def _live(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begun = loop.time()
            try:
                if await self._serve_until_lost() or self._scheduler.is_over:
                    break
                if loop.time() - begun > _STEADY_SECONDS:
                    self._pauses.reset()
                await self._start_again()
            except Exception:
                log.exception("model %s: a bug in the server; its engine serves on", self._spec.name)
                await asyncio.sleep(self._pauses.next())
        await self.engine.close()

    async def _serve_until_lost(self) -> bool:
        """Whether the scheduler is closed and empty; False where the engine was lost."""
        serving = [asyncio.create_task(self._serve()) for _ in range(self._spec.engine.slots)]
        over = asyncio.gather(*serving, return_exceptions=True)
        either: list[asyncio.Future[Any]] = [*serving, self.engine.lost]
        try:
            while not self.engine.lost.done() and not all(task.done() for task in serving):
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                either = [one for one in either if not one.done()]
                if any(task.done() and task.exception() is not None for task in serving):
                    break
            # While batches run the loss reaches their requests first.
            for task in serving:
                if task not in self._running:
                    task.cancel()
            ends = await over
        finally:
            over.cancel()
        for end in ends:
            if isinstance(end, BaseException) and not isinstance(end, EngineLost | asyncio.CancelledError):
                raise end
        return not any(ends)

    async def _serve(self) -> None:
        # Models share the cores; what runs on a GPU does not use them.
        size = self._spec.engine.threads if self.engine.device.startswith("CPU") else 0
        while await self._scheduler.due():
            await self._arrivals()
            async with self._turnstile.turn(self._spec.name, size=size):
                # Formed only now: what came while another model ran is in it.
                entries = self._scheduler.form()
                if entries:
                    await self._run(entries)
                del entries  # and what came with them, while nothing comes

    async def _arrivals(self) -> None:
        """Lets requests that are on their way through the loop join the batch, until none has for a few turns of it.

        Where the loop has time this is over at once; where it has not, batches grow instead of their number.
        """
        rows, turns = self._scheduler.rows, 0
        while turns < _QUIET_TURNS and rows < self._spec.batch.max_rows:
            await asyncio.sleep(0)
            turns = turns + 1 if self._scheduler.rows == rows else 0
            rows = self._scheduler.rows

    async def _run(self, entries: list[Entry]) -> None:
        rows = sum(entry.rows for entry in entries)
        padded = self._scheduler.pad_to(rows)
        started = time.perf_counter_ns()
        for entry in entries:
            entry.timings.started = started
        task = asyncio.current_task()
        self._running.add(task)
        try:
            ran = await self._answers(entries, padded)
        except EngineFailed as error:
            self._fail(entries, rows, padded, error)
            if isinstance(error, EngineLost):
                raise
            return
        except Exception as error:  # no memory, no descriptor, an answer that nobody understands
            log.error("model %s: a batch could not be run", self._spec.name, exc_info=error)
            failed = EngineFailed(f"model '{self._spec.name}' failed to run the batch ({type(error).__name__})")
            self._fail(entries, rows, padded, failed)
            return
        finally:
            self._running.discard(task)
            del task  # it ends with the exception, which has this frame: a circle that holds the batch's buffers
        self._scheduler.ran(rows, (time.perf_counter_ns() - started) / 1e9)
        for entry in entries:
            entry.timings.input_ready, entry.timings.infer_done = ran.input_ready, ran.infer_done
        try:
            self._told.batch(Batch(entries, rows, padded, ran.answers))
        except Exception as error:
            log.error("model %s: a batch could not be delivered", self._spec.name, exc_info=error)
            failed = EngineFailed(f"model '{self._spec.name}' failed to run the batch ({type(error).__name__})")
            self._told.batch(Batch(entries, rows, padded, [], failed))

    def _fail(self, entries: list[Entry], rows: int, padded: int, error: EngineFailed) -> None:
        self._scheduler.ran(rows, None)
        self._told.batch(Batch(entries, rows, padded, [], error))

    async def _answers(self, entries: list[Entry], padded: int) -> BatchResult:
        """The answer of a batch; where it has other rows than the batch, each request is run again, alone."""
        inputs, wanted = [entry.inputs for entry in entries], _wanted(entries)
        if not self._scheduler.alone:
            try:
                return await self.engine.run(inputs, wanted, padded)
            except RowsDiffer as error:
                log.error("%s: its requests are run alone from now on; max_batch_size 0 is right for it", error)
                self._scheduler.run_alone()
        runs = [await self.engine.run([one], wanted, whole=True) for one in inputs]
        return replace(runs[-1], answers=[run.answers[0] for run in runs])

    async def _start_again(self) -> None:
        """Starts the engine until that succeeds.

        What waits in the queue goes on waiting, each until its deadline, but no longer than until it is known that
        there is no engine for it: after the first attempt that fails, or ten seconds.
        """
        loop = asyncio.get_running_loop()
        name, lost = self._spec.name, self.engine
        await lost.close()
        if lost.hung:
            self._told.hung()
        why = f"its engine was lost ({await lost.lost})"
        late = loop.call_later(_DOWN_SECONDS, self._set_down, f"{why} and has not started again yet")
        try:
            while not self._scheduler.is_over:
                log.error("model %s: engine process %d: %s; starting it again", name, lost.pid, why)
                try:
                    self._engine = await EngineProcess.start(self._spec, lost.patience)
                except Exception as error:
                    told = str(error) if isinstance(error, InvalidModel) else f"{type(error).__name__}: {error}"
                    why = f"its engine does not start again: {told}"
                    late.cancel()
                    self._set_down(why)
                    pause = self._pauses.next()
                    log.error("model %s: %s; the next attempt is in %.1f s", name, why, pause)
                    await asyncio.sleep(pause)
                else:
                    self._told.restarted()
                    return
        finally:
            late.cancel()
            self._set_down("")

    def _set_down(self, why: str) -> None:
        changed = bool(why) != bool(self.down)
        self.down = why
        if changed or why:
            self._told.changed()


def _wanted(entries: list[Entry]) -> frozenset[str]:
    """The outputs that one entry or another asks for; empty, which is all, where one of them asks for all."""
    if all(entry.outputs for entry in entries):
        return frozenset().union(*(entry.outputs for entry in entries))
    return frozenset()
