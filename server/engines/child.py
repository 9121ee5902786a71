"""The engine process: `python -m convoynet.server.engines.child SOCKET NAME INPUTS OUTPUTS [INPUTS OUTPUTS ...]`.

process.py starts it. The first message is the EngineSpec. Every further one begins with the slot of a batch, which is
its pair of buffers as one byte, and says where the inputs lie there and which outputs are wanted; the answer begins
with the slot and says where those lie, after the time at which they were ready. A slot alone asks whether the engine is
there, and is answered with itself. The process ends when the socket does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue

import numpy as np

from convoynet.server import datatypes, engines
from convoynet.server.engines.base import Engine, EngineSpec, PipelinedEngine, Running, tensors_to_json
from convoynet.server.engines.buffers import SharedBuffer, Table
from convoynet.server.errors import InvalidModel
from convoynet.server.types import Tensor

MESSAGE_BYTES = 1 << 17
"""The longest message; the system's own limit is a little higher."""
TIME = struct.Struct("<q")
"""Before the answer to a batch: time.perf_counter_ns(), which counts alike in every process of a machine."""
_PR_SET_NAME = 15
_NICE = 5
"""Below the server's own process: what brings batches and takes answers away must not wait behind a batch that runs.
Measured on 2 cores with LeNet-5 at 32 in flight: 6 to 12 % more requests/s."""
_ERROR_CHARACTERS = 8000
_REMEMBERED = 64
_ENGINE_BROKE = 70
_LOADED = bytes([0])
"""Before the answer to the EngineSpec, where the slot of a batch stands otherwise."""


class _Batches:
    """Runs the batches in one slot of an engine. Layouts repeat: those seen before are not read or made again."""

    def __init__(self, engine: Engine, spec: EngineSpec, inputs: SharedBuffer, outputs: SharedBuffer) -> None:
        self._engine = engine
        self._datatypes = {t.name: t.datatype for t in (*spec.inputs, *spec.outputs)}
        self._inputs, self._outputs = inputs, outputs
        self._read: dict[bytes, tuple[Callable[[], Mapping[str, Tensor]], list[str]]] = {}
        self._laid_out: dict[object, tuple[bytes, dict[str, Tensor]]] = {}

    def run(self, message: bytes) -> bytes:
        """Runs one batch; returns the answer to its message."""
        inputs, wanted = self._read.get(message) or self._understand(message)
        found = self._engine.run(inputs(), wanted)
        answers = {name: self._serialized(name, values) for name, values in found.items()}
        key = tuple((name, values.shape, dims) for name, (values, dims) in answers.items())
        table, views = self._laid_out.get(key) or self._lay_out(key, answers)
        for name, (values, _) in answers.items():
            np.copyto(views[name], values, casting="equiv")
        return TIME.pack(time.perf_counter_ns()) + table

    def _understand(self, message: bytes) -> tuple[Callable[[], Mapping[str, Tensor]], list[str]]:
        stated = json.loads(message)
        table = Table.from_json(stated["inputs"])
        if self._inputs.reach(table.size) or len(self._read) >= _REMEMBERED:
            self._read.clear()
        views = {slot.name: self._inputs.array(slot) for slot in table.slots}
        texts = {slot.name: slot.dims for slot in table.slots if slot.datatype == "BYTES"}

        def inputs() -> Mapping[str, Tensor]:
            if not texts:
                return views
            return {n: datatypes.decode("BYTES", texts[n], v.tobytes()) if n in texts else v for n, v in views.items()}

        self._read[message] = inputs, stated["outputs"]
        return self._read[message]

    def _serialized(self, name: str, values: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """What is to lie in the buffer, and the tensor's own shape."""
        if self._datatypes[name] != "BYTES":
            return values, values.shape
        return np.frombuffer(datatypes.encode(values), np.uint8), values.shape

    def _lay_out(
        self, key: object, answers: Mapping[str, tuple[Tensor, tuple[int, ...]]]
    ) -> tuple[bytes, dict[str, Tensor]]:
        table = Table.of((n, self._datatypes[n], dims, values.nbytes) for n, (values, dims) in answers.items())
        if self._outputs.reach(table.size) or len(self._laid_out) >= _REMEMBERED:
            self._laid_out.clear()
        views = {slot.name: self._outputs.array(slot) for slot in table.slots}
        self._laid_out[key] = table.to_json().encode(), views
        return self._laid_out[key]


class Pipeline:
    """The batches of an engine that has several under way: begun in the order in which they come, and waited for so.

    Whatever goes wrong ends the process: only its batches are lost, and the server starts another.
    """

    def __init__(self, engine: PipelinedEngine, buffers: list[tuple[SharedBuffer, SharedBuffer]]) -> None:
        """Args: the engine, and the inputs and outputs of each slot, which it is told of."""
        self._engine = engine
        self._buffers = buffers
        self._prepared: list[dict[bytes, tuple[Running, bytes]]] = [{} for _ in buffers]
        self._begun: SimpleQueue[tuple[bytes, Running, bytes] | None] = SimpleQueue()
        for pair in buffers:
            for buffer, size in zip(pair, engine.largest, strict=True):
                buffer.reach(size)
                engine.pin(buffer.whole())

    def serve(self, connection: socket.socket) -> None:
        """Runs batches until the server hangs up."""
        answering = threading.Thread(target=self._answer, args=[connection], daemon=True)
        answering.start()
        with _ending_the_process():
            while message := connection.recv(MESSAGE_BYTES):
                if len(message) == 1:
                    connection.send(message)
                    continue
                slot = message[0]
                running, table = self._prepared[slot].get(message) or self._prepare(slot, message)
                running.submit()
                self._begun.put((message[:1], running, table))
        self._begun.put(None)
        answering.join()

    def _answer(self, connection: socket.socket) -> None:
        with _ending_the_process():
            while (begun := self._begun.get()) is not None:
                slot, running, table = begun
                running.wait()
                try:
                    connection.send(slot + TIME.pack(time.perf_counter_ns()) + table)
                except OSError:  # the server has hung up
                    return

    def _prepare(self, slot: int, message: bytes) -> tuple[Running, bytes]:
        stated = json.loads(message[1:])
        layout, (inputs, outputs) = Table.from_json(stated["inputs"]), self._buffers[slot]
        inputs.reach(layout.size)
        given = {one.name: inputs.array(one) for one in layout.slots}
        wanted = self._engine.answers(given, stated["outputs"])
        table = Table.of(wanted)
        outputs.reach(table.size)
        running = self._engine.prepare(slot, given, {one.name: outputs.array(one) for one in table.slots})
        if len(self._prepared[slot]) >= _REMEMBERED:
            self._prepared[slot].clear()
        self._prepared[slot][message] = running, table.to_json().encode()
        return self._prepared[slot][message]


@contextlib.contextmanager
def _ending_the_process() -> Iterator[None]:
    try:
        yield
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(_ENGINE_BROKE)


def main() -> None:
    """Loads the engine that the first message asks for, then runs batches until the server hangs up."""
    settle(sys.argv[2])
    connection = socket.socket(fileno=int(sys.argv[1]))
    spec = EngineSpec.from_json(connection.recv(MESSAGE_BYTES).decode())
    files = [SharedBuffer(int(descriptor)) for descriptor in sys.argv[3:]]
    _run(connection, spec, list(zip(files[::2], files[1::2], strict=True)))
    sys.stderr.flush()
    # The runtimes' threads make an orderly end of the interpreter slow, and some of them make it crash.
    os._exit(0)


def _run(connection: socket.socket, spec: EngineSpec, buffers: list[tuple[SharedBuffer, SharedBuffer]]) -> None:
    try:
        loaded = engines.load(spec)
        pipeline = Pipeline(loaded.engine, buffers) if isinstance(loaded.engine, PipelinedEngine) else None
    except Exception as error:
        connection.send(_LOADED + _error(error))
        return
    engine = loaded.engine
    connection.send(_LOADED + _description(loaded))
    if pipeline is not None:
        pipeline.serve(connection)
    else:
        slots = [_Batches(engine, spec, *pair) for pair in buffers]
        while message := connection.recv(MESSAGE_BYTES):
            try:
                answer = slots[message[0]].run(message[1:]) if len(message) > 1 else b""
            except Exception as error:
                answer = TIME.pack(time.perf_counter_ns()) + _error(error)
            connection.send(message[:1] + answer)
    engine.close()


def settle(name: str) -> None:
    """The server ends this process; a signal to the whole group (Ctrl-C) must not, while batches are still due."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"convoy {name}".encode()[:15])


def _description(loaded: engines.Loaded) -> bytes:
    engine = loaded.engine
    answer = {
        "device": engine.device,
        "info": {
            **engine.info,
            **({"passed_over": loaded.passed_over} if loaded.passed_over else {}),
            **({"warm_up": f"none: {loaded.cold}"} if loaded.cold else {}),
        },
        "buckets": engine.buckets,
        "seconds": loaded.seconds,
        "inputs": tensors_to_json(engine.inputs),
        "outputs": tensors_to_json(engine.outputs),
    }
    return json.dumps(answer).encode()


def _error(error: Exception) -> bytes:
    """What went wrong: one line for a client where it is about the model, else all of it for the log."""
    told = isinstance(error, InvalidModel)
    text = str(error) if told else "".join(traceback.format_exception(error))
    return json.dumps({"error": text[-_ERROR_CHARACTERS:], "invalid_model": told}).encode()


if __name__ == "__main__":
    main()
