"""What torture.py sends: requests whose answers are known, over gRPC, streams and HTTP, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from grpc import aio
from grpc._cython.cygrpc import ExecuteBatchError

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc

BOUND_SECONDS = 30.0
"""In which a request ends that has no deadline of its own: 5 s for a hung engine, its start, and what waits before."""
SLACK_SECONDS = 5.0
"""What the client's own loop may be late."""
MODELS = ("linear", "quick", "slow")
LARGEST = 4
_FAIR = {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED", "connection", "503", "429", "504"}
_TEXTS = {
    "try again": "UNAVAILABLE",
    "not ready": "UNAVAILABLE",
    "is failed": "UNAVAILABLE",
    "timeout expired": "DEADLINE_EXCEEDED",
    "queue size": "RESOURCE_EXHAUSTED",
    "failed to run": "INTERNAL",
}
"""How a request of a stream ended, by a part of its text."""
_SHORT_OF_MEMORY = {"INTERNAL", "500"}


@dataclass
class Tally:
    """What became of the requests.

    Attributes:
        ended: By how: a status, "connection" for one that broke.
        wrong: Answers that are not the request's, for people.
        unended: Requests that outlasted their bound.
        strange: Ends that no fault explains.
        slowest: Seconds that the slowest request took that had no deadline.
        short: Whether memory is short now, or was lately: then a batch may fail as INTERNAL.
    """

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unended: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    slowest: float = 0.0
    short: bool = False

    def end(self, how: str, what: str, begun: float, limit: float) -> None:
        """One more request is over."""
        took = time.monotonic() - begun
        self.ended[how] += 1
        self.slowest = max(self.slowest, took)
        if took > limit + SLACK_SECONDS:
            self.unended.append(f"{what}: {how} after {took:.1f} s, {limit:.1f} s were its bound")
        if how not in _FAIR and not (self.short and how in _SHORT_OF_MEMORY):
            self.strange.append(f"{what}: {how}")


def message(model: str, values: list[int]) -> pb.ModelInferRequest:
    """A request whose answer tells that it is its own."""
    rows = np.zeros((len(values), 4), np.float32)
    rows[:, 1] = values
    request = pb.ModelInferRequest(model_name=model, id=str(values[0]))
    request.inputs.add(name="x", datatype="FP32", shape=rows.shape)
    request.raw_input_contents.append(rows.tobytes())
    return request


def is_answer(answer: pb.ModelInferResponse, model: str, values: list[int]) -> bool:
    """Whether an answer is the one to message()."""
    got = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(len(values), -1)
    return answer.id == str(values[0]) and [float(v) for v in got[:, 0]] == [float(v) for v in values]


class Load:
    """Clients that ask the three models until they are stopped."""

    def __init__(self, grpc_address: str, http_address: str, seed: int, clients: int = 16) -> None:
        self.tally = Tally()
        self._grpc, (self._host, _, port) = grpc_address, http_address.rpartition(":")
        self._port = int(port)
        self._seed, self._clients = seed, clients
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.asking = asyncio.Event()

    def start(self) -> None:
        """Begins."""
        self.asking.set()
        self._tasks = [asyncio.create_task(self._client(n)) for n in range(self._clients)]

    async def stop(self) -> None:
        """Waits until every request has ended."""
        self._stop.set()
        self.asking.set()
        await asyncio.gather(*self._tasks)

    async def _client(self, number: int) -> None:
        rng = random.Random(self._seed * 1000 + number)
        channel = aio.insecure_channel(self._grpc, options=[("grpc.use_local_subchannel_pool", 1)])
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        kinds = [self._unary, self._unary, self._http, self._stream]
        while not self._stop.is_set():
            await self.asking.wait()
            model = rng.choice(MODELS)
            values = [rng.randrange(2**20) for _ in range(rng.randint(1, LARGEST))]
            deadline = rng.uniform(0.05, 5.0) if rng.random() < 0.4 else None
            await rng.choice(kinds)(stub, rng, model, values, deadline)
            await asyncio.sleep(rng.uniform(0, 0.05))
        await channel.close()

    async def _unary(
        self, stub: Any, rng: random.Random, model: str, values: list[int], deadline: float | None
    ) -> None:
        begun, limit, why = time.monotonic(), deadline or BOUND_SECONDS, ""
        call = stub.ModelInfer(message(model, values), timeout=deadline or 2 * BOUND_SECONDS)
        if rng.random() < 0.05:
            asyncio.get_running_loop().call_later(rng.uniform(0, 0.1), call.cancel)
        try:
            self._check(await call, model, values)
            how = "OK"
        except aio.AioRpcError as error:
            how, why = error.code().name, error.details() or ""
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():  # it is the campaign that ends
                raise
            how = "CANCELLED"
        self.tally.end(how, f"gRPC {model} {why}"[:300], begun, limit)

    async def _stream(
        self, stub: Any, rng: random.Random, model: str, values: list[int], deadline: float | None
    ) -> None:
        begun, limit = time.monotonic(), deadline or BOUND_SECONDS
        call = stub.ModelStreamInfer(timeout=deadline or 2 * BOUND_SECONDS)
        how, why = "OK", ""
        try:
            for _ in range(rng.randint(1, 3)):
                await call.write(message(model, values))
                reply = await call.read()
                if reply is aio.EOF:
                    how = (await call.code()).name
                    break
                if reply.error_message:
                    how = next((code for text, code in _TEXTS.items() if text in reply.error_message), "")
                    how, why = how or reply.error_message[:100], reply.error_message
                else:
                    self._check(reply.infer_response, model, values)
        except aio.AioRpcError as error:
            how, why = error.code().name, error.details() or ""
            if why == "Internal error from Core":  # the client's own words for a stream that ended while it wrote
                how = "connection"
        except (asyncio.InvalidStateError, ExecuteBatchError):  # the call has ended meanwhile
            how = (await asyncio.wait_for(call.code(), SLACK_SECONDS)).name
        finally:
            call.cancel()
        self.tally.end(how, f"stream {model} {why}"[:300], begun, limit)

    async def _http(self, stub: Any, rng: random.Random, model: str, values: list[int], deadline: float | None) -> None:
        begun = time.monotonic()
        rows = [x for value in values for x in (0, value, 0, 0)]
        tensor = {"name": "x", "datatype": "FP32", "shape": [len(values), 4], "data": rows}
        body = json.dumps({"id": str(values[0]), "inputs": [tensor]}).encode()
        try:
            async with asyncio.timeout(2 * BOUND_SECONDS):
                status, answer = await ask_http(self._host, self._port, f"/v2/models/{model}/infer", body)
            how = "OK" if status == 200 else str(status)
            if status == 200:
                told = json.loads(answer)
                got = told["outputs"][0]["data"][:: len(told["outputs"][0]["data"]) // len(values)]
                if told["id"] != str(values[0]) or [float(v) for v in got] != [float(v) for v in values]:
                    self.tally.wrong.append(f"HTTP {model} {values} was answered by {answer[:200]!r}")
        except TimeoutError:
            how = "no answer"
        except (OSError, ValueError, asyncio.IncompleteReadError):
            how = "connection"
        self.tally.end(how, f"HTTP {model}", begun, BOUND_SECONDS)

    def _check(self, answer: pb.ModelInferResponse, model: str, values: list[int]) -> None:
        if not is_answer(answer, model, values):
            self.tally.wrong.append(f"{model} {values} was answered by {answer}"[:500])


async def ask_http(host: str, port: int, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """A request on a connection of its own: the status and the body.

    Raises:
        OSError, ValueError: The connection broke, or what came is no answer.
    """
    reader, writer = await asyncio.open_connection(host, port)
    try:
        length = len(body or b"")
        method = "GET" if body is None else "POST"
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        writer.write(head.encode() + (body or b""))
        told = await reader.readuntil(b"\r\n\r\n")
        lengths = [line for line in told.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        length = int(lengths[0].partition(b":")[2]) if lengths else 0
        return int(told.split()[1]), await reader.readexactly(length)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def hang_up(host: str, port: int, rng: random.Random) -> None:
    """A client that sends a part of a request and resets the connection."""
    with suppress(OSError), socket.create_connection((host, port), timeout=5) as way:
        way.sendall(_request(rng)[: rng.randrange(1, 200)])
        way.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def send_half(host: str, port: int, rng: random.Random) -> socket.socket | None:
    """A client that sends half a request and waits; the socket, to be closed later."""
    with suppress(OSError):
        way = socket.create_connection((host, port), timeout=5)
        whole = _request(rng)
        way.sendall(whole[: rng.randrange(20, len(whole) - 1)])
        return way
    return None


def stop_reading(host: str, port: int, rng: random.Random) -> socket.socket | None:
    """A client that asks again and again and reads no answer; the socket, to be closed later."""
    with suppress(OSError):
        way = socket.socket()
        way.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        way.settimeout(0.5)
        way.connect((host, port))
        with suppress(TimeoutError):
            for _ in range(200):
                way.sendall(_request(rng))
        return way
    return None


def _request(rng: random.Random) -> bytes:
    rows = [float(rng.randrange(100)) for _ in range(4 * LARGEST)]
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [LARGEST, 4], "data": rows}]}).encode()
    return b"POST /v2/models/quick/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
