"""One engine of a model: takes batches from the scheduler, runs them, and starts again when its process dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convoynet.server.engines.process import EngineProcess
from convoynet.server.errors import EngineFailed, EngineLost, InvalidModel
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.scheduling.turnstile import Turnstile
from convoynet.server.spec import ModelSpec
from convoynet.server.types import Tensor

log = logging.getLogger(__name__)

# An engine that dies again and again is given longer and longer rests, in seconds.
_FIRST_REST, _LONGEST_REST = 0.05, 5.0
_QUIET_TURNS = 4
"""Measured with benchmarks/frontends.py: a tenth to a fifth more requests/s at 32 in flight, as many at 1."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that ran: its entries with the rows of the answer that are theirs, or the error that it ended with."""

    entries: list[Entry]
    rows: int
    padded: int
    answers: list[dict[str, Tensor]]
    error: EngineFailed | None = None


class Instance:
    """Lives on the event loop, as a task of its own from start() until the scheduler is closed and empty."""

    def __init__(
        self,
        spec: ModelSpec,
        scheduler: Scheduler,
        turnstile: Turnstile,
        deliver: Callable[[Batch], None],
        restarted: Callable[[], None],
    ) -> None:
        self._spec = spec
        self._scheduler = scheduler
        self._turnstile = turnstile
        self._deliver = deliver
        self._restarted = restarted
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
        """
        self._engine = await EngineProcess.start(self._spec)
        self._life = asyncio.create_task(self._live(), name=f"instance of {self._spec.name}/{self._spec.version}")

    async def stopped(self) -> None:
        """Waits until everything in the scheduler was served and the engine has ended."""
        if self._life is not None:
            await self._life

    async def _live(self) -> None:
        while not await self._serve_until_lost() and not self._scheduler.is_over:
            await self._start_again()
        await self.engine.close()

    async def _serve_until_lost(self) -> bool:
        """Whether the scheduler is closed and empty; False where the engine was lost."""
        serving = [asyncio.create_task(self._serve()) for _ in range(self._spec.engine.slots)]
        over = asyncio.gather(*serving, return_exceptions=True)
        either: list[asyncio.Future[Any]] = [over, self.engine.lost]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
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
        self._running.add(asyncio.current_task())
        try:
            inputs = [entry.inputs for entry in entries]
            ran = await self.engine.run(inputs, _wanted(entries), padded)
        except EngineFailed as error:
            self._scheduler.ran(rows, None)
            self._deliver(Batch(entries, rows, padded, [], error))
            if isinstance(error, EngineLost):
                raise
            return
        finally:
            self._running.discard(asyncio.current_task())
        self._scheduler.ran(rows, (ran.infer_done - started) / 1e9)
        for entry in entries:
            entry.timings.input_ready, entry.timings.infer_done = ran.input_ready, ran.infer_done
        self._deliver(Batch(entries, rows, padded, ran.answers))

    async def _start_again(self) -> None:
        """Starts the engine until that succeeds; what waits in the queue goes on waiting, each until its deadline."""
        rest = _FIRST_REST
        while not self._scheduler.is_over:
            log.error("model %s: engine process %d was lost; starting it again", self._spec.name, self.engine.pid)
            await self.engine.close()
            try:
                self._engine = await EngineProcess.start(self._spec)
            except InvalidModel as error:
                log.error("model %s: its engine does not start again: %s", self._spec.name, error)
                await asyncio.sleep(rest)
                rest = min(2 * rest, _LONGEST_REST)
            else:
                self._restarted()
                return


def _wanted(entries: list[Entry]) -> frozenset[str]:
    """The outputs that one entry or another asks for; empty, which is all, where one of them asks for all."""
    if all(entry.outputs for entry in entries):
        return frozenset().union(*(entry.outputs for entry in entries))
    return frozenset()
