"""One engine in a process of its own, as the server's event loop sees it."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from convoynet.server import datatypes
from convoynet.server.engines.base import EngineSpec, tensors_from_json
from convoynet.server.engines.child import MESSAGE_BYTES, TIME
from convoynet.server.engines.place import Answer, Place, Plan
from convoynet.server.errors import EngineFailed, EngineLost, InvalidModel
from convoynet.server.host import package_environment
from convoynet.server.spec import EngineOptions, ModelSpec, TensorSpec
from convoynet.server.types import Tensor

log = logging.getLogger(__name__)

_COPY_ON_LOOP_BYTES = 2 << 20
"""More than this is copied in a thread: measured, 2 MiB take 0.15 ms, in a thread 0.2 ms and on busy cores 0.4 ms."""
_END_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class BatchResult:
    """A batch that ran.

    Attributes:
        answers: The outputs of each request, in order: arrays of its own rows, which it may keep.
        started, input_ready, infer_done: When its inputs began to be gathered, lay ready, and when the engine was
            done; nanoseconds of time.perf_counter_ns().
    """

    answers: list[dict[str, Tensor]]
    started: int
    input_ready: int
    infer_done: int


class EngineProcess:
    """Lives on the event loop. Runs one batch at a time, or as many as its spec says; further ones wait.

    Attributes:
        device: Where the engine runs, for people.
        info: The runtime, its version and what it was told.
        buckets: Batch sizes, ascending, up to which every batch is to be filled; empty where it is to be run as it is.
        inputs, outputs: What the file states.
        pid: Of the process.
        load_seconds: What loading took, without the start of the process and the warm-up.
        lost: Done when the process died unasked; the reason.
    """

    def __init__(self, spec: EngineSpec) -> None:
        """Starts the process; `start` and `describe` are for callers."""
        self._loop = asyncio.get_running_loop()
        self._spec = spec
        self._output_names = [t.name for t in spec.outputs]
        types = {t.name: t.datatype for t in spec.inputs}
        self._places = [Place(index, types) for index in range(spec.options.slots)]
        self._free = deque(self._places)
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
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = self._spawn(theirs.fileno())
        self.pid = self._process.pid
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket.fileno(), self._on_readable)

    @classmethod
    async def start(cls, spec: ModelSpec) -> EngineProcess:
        """Starts the process, loads the model and warms it up.

        Raises:
            InvalidModel: The engine does not take the model; the message says why.
        """
        return await cls._start(EngineSpec.of(spec))

    @staticmethod
    async def describe(
        file: Path, backend: str, device: str = "cpu"
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The inputs and outputs that a file states: `dims` have the batch axis first, where there is one, as -1.

        Raises:
            InvalidModel: The engine does not take the file; the message says why.
        """
        # OpenVINO has several names for some tensors, of which one alone is the file's.
        exact = "onnxruntime" if backend == "onnxruntime" and find_spec("onnxruntime") else ""
        options = EngineOptions(backend, file, device, 1, engine=exact, graph_optimization="basic")
        spec = EngineSpec(file.name, "", (), (), 0, options)
        engine = await EngineProcess._start(spec)
        await engine.close()
        return engine.inputs, engine.outputs

    async def run(
        self, requests: Sequence[Mapping[str, Tensor]], outputs: Collection[str] = (), pad_to: int = 0
    ) -> BatchResult:
        """Runs some requests as one batch.

        Args:
            requests: The inputs of each, by name; all of one shape behind the rows. Without a batch axis just one.
            outputs: Names of the outputs that somebody wants; empty for all.
            pad_to: The number of rows to fill the batch up to, with zeros; what they yield is dropped.

        Raises:
            EngineFailed: The engine raised; the log has the details.
            EngineLost: The process died before the batch was done, or is closed.
        """
        going: asyncio.Future[Any] | None = None
        place = self._free.popleft() if self._free else await self._turn()
        try:
            if self._gone:
                raise EngineLost(self._spec.name)
            started = time.perf_counter_ns()
            plan, sources = self._prepare(place, requests, outputs, pad_to)
            if plan.size <= _COPY_ON_LOOP_BYTES:
                _gather(plan.views, sources)
            else:
                going = self._loop.run_in_executor(None, _gather, plan.views, sources)
                await asyncio.shield(going)
            input_ready = time.perf_counter_ns()
            going = self._send(place, plan.message)
            infer_done, answers = self._understand(place, await asyncio.shield(going))
            size = sum(view.nbytes for _, view in answers)
            if size <= _COPY_ON_LOOP_BYTES:
                parts = self._split(answers, requests, pad_to)
            else:
                going = self._loop.run_in_executor(None, self._split, answers, requests, pad_to)
                parts = await asyncio.shield(going)
            return BatchResult(parts, started, input_ready, infer_done)
        finally:
            # The caller may be cancelled. What it began goes on, in buffers that the next batch must not touch yet.
            if going is None or going.done():
                self._give_back(place)
            else:
                going.add_done_callback(lambda _: self._give_back(place))

    async def close(self) -> None:
        """Asks the process to end, kills it where it does not, and gives its memory back. Batches that run are lost."""
        if self._ending is None:
            self._asked = True
            self._hang_up()
            self._ending = self._loop.create_task(self._end(_END_SECONDS))
        await asyncio.shield(self._ending)

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
    async def _start(cls, spec: EngineSpec) -> EngineProcess:
        engine = cls(spec)
        try:
            await engine._load()
        except BaseException:
            await engine.close()
            raise
        return engine

    def _spawn(self, connection: int) -> subprocess.Popen[bytes]:
        descriptors = [d for place in self._places for d in place.descriptors]
        label = "/".join(filter(None, (self._spec.name, self._spec.version)))
        return subprocess.Popen(  # noqa: S603 - this interpreter, with our own module
            [
                sys.executable,
                "-P",
                "-m",
                "convoynet.server.engines.child",
                str(connection),
                label,
                *map(str, descriptors),
            ],
            pass_fds=(connection, *descriptors),
            env=package_environment(),
            stdin=subprocess.DEVNULL,
            stdout=2,  # a runtime that prints does so to the log
        )

    async def _load(self) -> None:
        message = await self._send(self._places[0], self._spec.to_json().encode())
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
        self.device, self.info, self.load_seconds = loaded["device"], loaded["info"], loaded["seconds"]
        self.buckets = tuple(loaded["buckets"])
        self.inputs, self.outputs = tensors_from_json(loaded["inputs"]), tensors_from_json(loaded["outputs"])
        if "passed_over" in self.info:
            log.warning(
                "model %s version %s runs in %s, since: %s",
                self._spec.name, self._spec.version, self.info["runtime"], self.info["passed_over"],
            )  # fmt: skip

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
                parts = [_serialized(parts, shape)]
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

    def _split(
        self, outputs: Sequence[Answer], requests: Sequence[Mapping[str, Tensor]], pad_to: int
    ) -> list[dict[str, Tensor]]:
        """Gives each request a copy of its own rows."""
        parts: list[dict[str, Tensor]] = [{} for _ in requests]
        counts = [len(next(iter(request.values()))) for request in requests] if self._spec.max_rows else []
        for slot, view in outputs:
            values = datatypes.decode("BYTES", slot.dims, view.tobytes()) if slot.datatype == "BYTES" else view
            if not counts:
                parts[0][slot.name] = values.copy()
                continue
            if len(values) != max(sum(counts), pad_to):
                log.error("output %s of model %s has %d rows", slot.name, self._spec.name, len(values))
                raise EngineFailed(f"model '{self._spec.name}' failed to run the batch")
            start = 0
            for part, rows in zip(parts, counts, strict=True):
                part[slot.name] = values[start : start + rows].copy()
                start += rows
        return parts

    def _send(self, place: Place, message: bytes) -> asyncio.Future[bytes]:
        """Sends a message about a place; the answer is empty where the process died."""
        answer: asyncio.Future[bytes] = self._loop.create_future()
        if self._gone:
            answer.set_result(b"")
            return answer
        place.answer = answer
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

    def _lose(self) -> None:
        self._hang_up()
        self._ending = self._loop.create_task(self._end(0))

    def _hang_up(self) -> None:
        """No further word to or from the process, which ends when it notices."""
        self._gone = True
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for place in self._places:
            place.settle(b"")

    async def _end(self, patience: float) -> None:
        """Waits for the end of the process, kills it after `patience` seconds, and says how it ended."""
        ended = self._loop.run_in_executor(None, self._process.wait)
        if not patience or not (await asyncio.wait([ended], timeout=patience))[0]:
            self._process.kill()
        code = await ended
        # Batches that were done just before may still be read.
        held = [self._free.popleft() if self._free else await self._turn() for _ in self._places]
        for place in held:
            place.close()
            self._give_back(place)
        if not self._asked:
            self.lost.set_result(f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")


def _serialized(parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The texts of some requests, filled up to `shape`, as the protocol serializes them."""
    texts = np.full(shape, b"", object)
    if parts[0].shape == shape:
        texts = parts[0]
    else:
        np.concatenate(parts, out=texts[: sum(map(len, parts))])
    return np.frombuffer(datatypes.encode(texts), np.uint8)


def _gather(views: Mapping[str, Tensor], sources: Sequence[tuple[str, Sequence[Tensor]]]) -> None:
    """Copies the inputs of a batch to where the engine reads them: the one copy on their way."""
    for name, parts in sources:
        view = views[name]
        if len(parts) == 1 and parts[0].shape == view.shape:
            np.copyto(view, parts[0], casting="equiv")
        else:
            rows = sum(map(len, parts))
            np.concatenate(parts, out=view[:rows], casting="equiv")
            view[rows:] = 0
