"""One engine in a process of its own, as the server's event loop sees it."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import signal
import socket
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen
from typing import Any

from convoynet.server.engines import rows
from convoynet.server.engines.base import EngineSpec, tensors_from_json
from convoynet.server.engines.child import MESSAGE_BYTES, TIME
from convoynet.server.engines.patience import PING_SECONDS, TICK_SECONDS, Patience
from convoynet.server.engines.place import Answer, BatchResult, Place, Plan
from convoynet.server.errors import EngineFailed, EngineLost, InvalidModel
from convoynet.server.spec import LIMITS, EngineOptions, Limits, ModelSpec, TensorSpec
from convoynet.server.supervision import ending, processes, tasks
from convoynet.server.types import Tensor

log = logging.getLogger(__name__)

_COPY_ON_LOOP_BYTES = 2 << 20
"""More than this is copied in a thread: measured, 2 MiB take 0.15 ms, in a thread 0.2 ms and on busy cores 0.4 ms."""
_END_SECONDS = 5.0
_PING_EVERY_SECONDS = 1.5
"""An engine without work is asked so often whether it still answers."""


class EngineProcess:
    """Lives on the event loop. Runs one batch at a time, or as many as its spec says; further ones wait.

    Attributes:
        device: Where the engine runs, for people.
        info: The runtime, its version and what it was told.
        buckets: Batch sizes, ascending, up to which every batch is to be filled; empty where it is to be run as it is.
        inputs, outputs: What the file states.
        pid: Of the process.
        load_seconds: What loading took, without the start of the process and the warm-up.
        hung: Whether it was ended since it did not answer in time.
        stopped: For how many seconds of waiting for it a signal has stopped the process.
        lost: Done when the process died unasked; the reason.
    """

    def __init__(self, spec: EngineSpec, limits: Limits, patience: Patience | None = None) -> None:
        """Starts the process; `start` and `describe` are for callers.

        Raises:
            OSError: The system has no room for it.
        """
        self._loop = asyncio.get_running_loop()
        self._spec = spec
        self._output_names = [t.name for t in spec.outputs]
        self.patience = patience or Patience(limits)
        self._loaded = self.hung = False
        self._idle = self.stopped = 0.0
        self._why = ""
        self._waiting: deque[asyncio.Future[Place]] = deque()
        self._ending: asyncio.Task[None] | None = None
        self._gone = self._asked = False
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self.device = ""
        self.info: Mapping[str, str] = {}
        self.buckets: tuple[int, ...] = ()
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.load_seconds = 0.0
        types = {t.name: t.datatype for t in (*spec.inputs, *spec.optional)}
        with ExitStack() as undo:
            self._places = []
            for index in range(spec.options.slots):
                self._places.append(Place(index, types))
                undo.callback(self._places[-1].close)
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._socket.close)
            with theirs:
                self._process = self._spawn(theirs.fileno())
            undo.pop_all()
        self._free = deque(self._places)
        self.pid = self._process.pid
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket.fileno(), self._on_readable)
        self._clock = self._loop.call_later(TICK_SECONDS, self._tick)

    @classmethod
    async def start(cls, spec: ModelSpec, patience: Patience | None = None) -> EngineProcess:
        """Starts the process, loads the model and warms it up.

        Args:
            spec: The model.
            patience: What is known of how long its batches take.

        Raises:
            InvalidModel: The engine does not take the model, or takes too long for it; the message says why.
            OSError: The system has no room for the process.
        """
        return await cls._start(EngineSpec.of(spec), spec.limits, patience)

    @staticmethod
    async def describe(
        file: Path, backend: str, device: str = "cpu", limits: Limits = LIMITS
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The inputs and outputs that a file states: `dims` have the batch axis first, where there is one, as -1.

        Raises:
            InvalidModel: The engine does not take the file; the message says why.
        """
        # OpenVINO has several names for some tensors, of which one alone is the file's.
        exact = "onnxruntime" if backend == "onnxruntime" and find_spec("onnxruntime") else ""
        options = EngineOptions(backend, file, device, 1, engine=exact, graph_optimization="basic")
        spec = EngineSpec(file.name, "", (), (), 0, options)
        engine = await EngineProcess._start(spec, limits)
        await engine.close()
        return engine.inputs, engine.outputs

    async def run(
        self,
        requests: Sequence[Mapping[str, Tensor]],
        outputs: Collection[str] = (),
        pad_to: int = 0,
        *,
        whole: bool = False,
    ) -> BatchResult:
        """Runs some requests as one batch.

        Args:
            requests: The inputs of each, by name; all of one shape behind the rows. Without a batch axis just one.
            outputs: Names of the outputs that somebody wants; empty for all.
            pad_to: The number of rows to fill the batch up to, with zeros; what they yield is dropped.
            whole: Whether the one request is given whatever the engine answers, also where it has other rows.

        Raises:
            EngineFailed: The engine raised; the log has the details.
            RowsDiffer: An output has other rows than the batch.
            EngineLost: The process died before the batch was done, took too long for it, or is closed.
        """
        going: asyncio.Future[Any] | None = None
        place = self._free.popleft() if self._free else await self._turn()
        try:
            if self._gone:
                raise EngineLost(self._spec.name)
            started = time.perf_counter_ns()
            plan, sources = self._prepare(place, requests, outputs, pad_to)
            if plan.size <= _COPY_ON_LOOP_BYTES:
                rows.gather(plan.views, sources)
            else:
                going = self._loop.run_in_executor(None, rows.gather, plan.views, sources)
                await asyncio.shield(going)
            input_ready = time.perf_counter_ns()
            going = self._send(place, plan.message, plan.size)
            infer_done, answers = self._understand(place, await asyncio.shield(going))
            self.patience.took(plan.size, (infer_done - input_ready) / 1e9)
            size = sum(view.nbytes for _, view in answers)
            if size <= _COPY_ON_LOOP_BYTES:
                parts = rows.split(self._spec, answers, requests, pad_to, whole=whole)
            else:
                split = partial(rows.split, self._spec, answers, requests, pad_to, whole=whole)
                going = self._loop.run_in_executor(None, split)
                parts = await asyncio.shield(going)
            return BatchResult(parts, started, input_ready, infer_done)
        finally:
            # The caller may be cancelled. What it began goes on, in buffers that the next batch must not touch yet.
            if going is None or going.done():
                self._give_back(place)
            else:
                going.add_done_callback(lambda _: self._give_back(place))

    async def close(self) -> None:
        """Asks the process to end, kills it where it does not, and gives its memory back. Batches that run are lost.

        One that has not loaded is killed at once: it would hear of it only when it has.
        """
        if self._ending is None:
            self._asked = True
            self._hang_up()
            self._begin_end(_END_SECONDS if self._loaded else 0.0)
        if self._ending is not None:
            await asyncio.wait([self._ending])

    async def _turn(self) -> Place:
        """Waits for a place; who came first gets the first one."""
        place: asyncio.Future[Place] = self._loop.create_future()
        self._waiting.append(place)
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._give_back(place.result())
            raise

    def _give_back(self, place: Place) -> None:
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(place)
                return
        self._free.append(place)

    @classmethod
    async def _start(cls, spec: EngineSpec, limits: Limits, patience: Patience | None = None) -> EngineProcess:
        """Loads; where a signal stops the process meanwhile, which says nothing of the model, once again."""
        once = False
        while True:
            engine = cls(spec, limits, patience)
            try:
                await engine._load()
            except BaseException:
                await engine.close()
                if once or not engine.hung or not engine.stopped:
                    raise
                once = True
            else:
                return engine

    def _spawn(self, connection: int) -> Popen[bytes]:
        descriptors = [d for place in self._places for d in place.descriptors]
        label = "/".join(filter(None, (self._spec.name, self._spec.version)))
        arguments = (str(connection), label, *map(str, descriptors))
        # A runtime that prints does so to the log.
        module = "convoynet.server.engines.child"
        return processes.spawn(module, *arguments, descriptors=(connection, *descriptors), stdout=2)

    async def _load(self) -> None:
        begun, self._places[0].limit = self._loop.time(), self.patience.load_s
        described = self._spec.to_json().encode()
        if len(described) > MESSAGE_BYTES:
            raise InvalidModel(
                f"its inputs, outputs and parameters take {len(described)} bytes to name, {MESSAGE_BYTES} are allowed"
            )
        message = await self._send(self._places[0], described)
        self._places[0].limit = 0.0
        if not message:
            raise InvalidModel(f"its engine process died while it loaded the model: {await self.lost}")
        loaded = json.loads(message)
        if "error" in loaded:
            if loaded["invalid_model"]:
                raise InvalidModel(loaded["error"])
            log.error("model %s version %s: loading failed\n%s", self._spec.name, self._spec.version, loaded["error"])
            raise InvalidModel(
                f"loading failed: {loaded['error'].strip().splitlines()[-1].partition(':')[0]} (see the log)"
            )
        self._loaded = True
        self.patience.loaded(self._loop.time() - begun)
        self.device, self.info, self.load_seconds = loaded["device"], loaded["info"], loaded["seconds"]
        self.buckets = tuple(loaded["buckets"])
        self.inputs, self.outputs = tensors_from_json(loaded["inputs"]), tensors_from_json(loaded["outputs"])
        if "passed_over" in self.info:
            log.warning(
                "model %s version %s runs in %s, since: %s",
                self._spec.name, self._spec.version, self.info["runtime"], self.info["passed_over"],
            )  # fmt: skip
        if "inexact" in self.info:
            log.warning("model %s version %s: %s", self._spec.name, self._spec.version, self.info["inexact"])

    def _prepare(
        self, place: Place, requests: Sequence[Mapping[str, Tensor]], outputs: Collection[str], pad_to: int
    ) -> tuple[Plan, list[tuple[str, list[Tensor]]]]:
        """Where the batch goes, and what is to be copied there for each input."""
        sources, tensors = [], []
        for name in requests[0]:
            parts = [request[name] for request in requests]
            shape = parts[0].shape
            if self._spec.max_rows:
                shape = (max(sum(map(len, parts)), pad_to), *shape[1:])
            if parts[0].dtype == object:
                parts = [rows.serialized(parts, shape)]
                tensors.append((name, shape, parts[0].nbytes))
            else:
                tensors.append((name, shape, math.prod(shape) * parts[0].itemsize))
            sources.append((name, parts))
        wanted = tuple(name for name in self._output_names if name in outputs)
        return place.plan(wanted, tensors), sources

    def _understand(self, place: Place, answer: bytes) -> tuple[int, list[Answer]]:
        """When the engine was done, and where each output lies."""
        if not answer:
            raise EngineLost(self._spec.name)
        (infer_done,) = TIME.unpack_from(answer)
        rest = answer[TIME.size :]
        if rest.startswith(b"{"):
            log.error(
                "model %s version %s: a batch failed\n%s",
                self._spec.name,
                self._spec.version,
                json.loads(rest)["error"],
            )
            raise EngineFailed(f"model '{self._spec.name}' failed to run the batch")
        return infer_done, place.read(rest)

    def _send(self, place: Place, message: bytes, size: int = 0) -> asyncio.Future[bytes]:
        """Sends a message about a place; the answer is empty where the process died."""
        answer: asyncio.Future[bytes] = self._loop.create_future()
        if self._gone:
            answer.set_result(b"")
            return answer
        place.answer, place.waited, place.size = answer, 0.0, size
        self._idle = 0.0
        try:
            self._socket.send(message)
        except OSError:
            self._lose()
        return answer

    def _on_readable(self) -> None:
        try:
            message = self._socket.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._lose()
        else:
            self._places[message[0]].settle(message[1:])

    def _tick(self) -> None:
        """Ends an engine that takes too long, and asks one without work whether it is there.

        Time is counted in ticks: a machine that stands still for a while stands still for all.
        """
        self._clock = self._loop.call_later(TICK_SECONDS, self._tick)
        awaited = False
        for place in self._places:
            if place.answer is not None:
                place.waited += TICK_SECONDS
                limit = place.limit or self.patience.of(place.size)
                if place.waited > limit:
                    what = "a batch" if place.size else "a word" if self._loaded else "loading and warming up"
                    self._give_up(f"{what} took longer than {limit:g} s")
                    return
                awaited = True
        self.stopped = self.stopped + TICK_SECONDS if awaited and processes.is_stopped(self.pid) else 0.0
        if self.stopped > processes.STOPPED_SECONDS:
            self._give_up(f"a signal has stopped it for {processes.STOPPED_SECONDS:g} s")
            return
        self._idle += TICK_SECONDS
        if self._loaded and self._idle >= _PING_EVERY_SECONDS and len(self._free) == len(self._places):
            place = self._free.popleft()
            place.limit = PING_SECONDS
            self._send(place, bytes([place.index])).add_done_callback(lambda _: self._pinged(place))

    def _pinged(self, place: Place) -> None:
        place.limit = 0.0
        self._give_back(place)

    def _give_up(self, why: str) -> None:
        self.hung = True
        self._why = f"it was ended, since {why}"
        log.error(
            "model %s version %s: engine process %d: %s", self._spec.name, self._spec.version, self.pid, self._why
        )
        self._lose()

    def _lose(self) -> None:
        if self._gone:
            return
        self._hang_up()
        self._begin_end(0.0)

    def _hang_up(self) -> None:
        """No further word to or from the process, which ends when it notices."""
        self._gone = True
        self._clock.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for place in self._places:
            place.settle(b"")

    def _begin_end(self, patience: float) -> None:
        self._ending = tasks.start(self._end(patience), f"the end of engine process {self.pid}")

    async def _end(self, patience: float) -> None:
        """Waits for the end of the process, kills it after `patience` seconds, and says how it ended."""
        how = "it does not end"
        try:
            code = await ending.end(self._process, patience)
            if code is not None:
                how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                with suppress(ValueError):  # not every signal has a name
                    how = f"killed by {signal.Signals(-code).name}" if code < 0 else how
            # Batches that were done just before may still be read.
            held = [self._free.popleft() if self._free else await self._turn() for _ in self._places]
            for place in held:
                place.close()
                self._give_back(place)
        finally:
            if not self._asked and not self.lost.done():
                self.lost.set_result(self._why or how)
