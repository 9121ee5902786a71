"""A server under more than is good for it: every answer is its request's own, and none is missing."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc
from tests.server.conftest import fake_model, infer_request
from tests.server.onnx_models import write_linear
from tests.server.process import ServeProcess

CLIENTS, CHANNELS, LARGEST_BATCH = 200, 8, 8
ENOUGH = 2 * CLIENTS
"""Good answers that a run has at least, however long a slow machine takes for them."""
KINDS = {"plain": 5, "deadline": 2, "timeout": 1, "cancel": 2}
OK, LATE = grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
LOST_AFTER_S = 240.0
"""Longer than any machine takes: who has a minute may be refused by what a busy one is measured to take."""
MODELS = {"sum": 1.0, "linear": 2.0}
"""Each with what it makes of the number that a request's row holds."""


@asynccontextmanager
async def stubs(url: str) -> AsyncIterator[list[Any]]:
    """Clients on connections of their own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [aio.insecure_channel(url, options=options) for _ in range(CHANNELS)]
    yield [grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in channels]
    for channel in channels:
        await channel.close()


def request_of(model: str, values: list[int]) -> pb.ModelInferRequest:
    """A request whose answer is `values` times the model's factor."""
    request = infer_request(*values, model=model)
    request.inputs[0].name = {"sum": "x", "linear": "input"}[model]
    request.id = str(values[0])
    return request


def is_answer(response: pb.ModelInferResponse, model: str, values: list[int]) -> bool:
    """Whether a response is the one to request_of()."""
    array = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(response.outputs[0].shape)
    column = {"sum": 0, "linear": 1}[model]
    return response.id == str(values[0]) and array[:, column].tolist() == [v * MODELS[model] for v in values]


@dataclass
class Tally:
    """What became of the requests.

    Attributes:
        sent: By kind.
        ended: By kind and status; a status of None is a client's own cancellation.
        wrong: What must not be, for people.
    """

    sent: Counter[str] = field(default_factory=Counter)
    ended: Counter[tuple[str, grpc.StatusCode | None]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def answered(self) -> int:
        """Requests with a good answer."""
        return sum(count for (_, code), count in self.ended.items() if code is OK)


async def one_request(stub: Any, rng: random.Random, tally: Tally) -> None:
    """Sends a request of a random kind and checks how it ends."""
    model, rows = rng.choice(list(MODELS)), rng.randint(1, LARGEST_BATCH + 1)
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    values = [rng.randrange(2**20) for _ in range(rows)]
    request = request_of(model, values)
    patience = rng.uniform(0.001, 0.1)
    allowed: set[grpc.StatusCode | None] = {OK} if rows <= LARGEST_BATCH else {grpc.StatusCode.INVALID_ARGUMENT}
    if kind in ("deadline", "timeout"):
        allowed.add(LATE)
    if kind == "timeout":
        request.parameters["timeout"].int64_param = int(patience * 1e6)
    tally.sent[kind] += 1
    call = stub.ModelInfer(request, timeout=patience if kind == "deadline" else LOST_AFTER_S)
    if kind == "cancel":
        asyncio.get_running_loop().call_later(patience, call.cancel)
        allowed.add(None)
    code: grpc.StatusCode | None
    try:
        response = await call
        code = OK
        if not is_answer(response, model, values):
            tally.wrong.append(f"{kind} {model} {values} was answered by {response}")
    except aio.AioRpcError as error:
        code = error.code()
        if code not in allowed:
            tally.wrong.append(f"{kind} {model} of {rows} rows ended with {code.name} {error.details()}")
    except asyncio.CancelledError:
        code = None
        if code not in allowed:
            raise
    tally.ended[kind, code] += 1


async def reload(stub: Any, end: float) -> int:
    """Loads the models again and again until `end`; how often it did."""
    done = 0
    while time.monotonic() < end:
        for model in MODELS:
            await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=model), timeout=LOST_AFTER_S)
            done += 1
            await asyncio.sleep(0.3)
    return done


async def rewrite(folder: Path, end: float) -> int:
    """Writes a model's file anew again and again until `end`, for a server that looks for changes; how often."""
    done = 0
    while time.monotonic() < end:
        await asyncio.sleep(1.0)
        done += 1
        changed = folder / "1" / "changed"
        changed.write_text(json.dumps({"seconds": 0.002 + 0.0001 * (done % 2)}))
        changed.rename(folder / "1" / "model.json")
    return done


async def resident(server: ServeProcess, end: float) -> list[int]:
    """The server's memory, taken five times a second until `end`."""
    samples = []
    while time.monotonic() < end:
        samples.append(server.resident_bytes())
        await asyncio.sleep(0.2)
    return samples


@pytest.mark.parametrize("mode", ["explicit", "poll"])
@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.slow)])
async def test_every_answer_is_its_requests_own_and_none_is_lost(tmp_path: Path, seconds: float, mode: str) -> None:
    config = f"max_batch_size: {LARGEST_BATCH}\ndynamic_batching {{ }}\n"
    fake_model(tmp_path, config=config, seconds=0.002)
    write_linear(tmp_path, max_batch=LARGEST_BATCH)
    tally = Tally()
    settings = {"load_model": "*"} if mode == "explicit" else {"repository_poll_secs": "0.3", "frontends": "2"}
    with ServeProcess(tmp_path, model_control_mode=mode, **settings) as server:
        async with stubs(server.url) as each:
            end = time.monotonic() + seconds

            async def client(number: int) -> None:
                rng = random.Random(number)
                while time.monotonic() < end or tally.answered() < ENOUGH:
                    await one_request(each[number % CHANNELS], rng, tally)

            reloading = reload(each[0], end) if mode == "explicit" else rewrite(tmp_path / "sum", end)
            others = asyncio.gather(reloading, resident(server, end))
            await asyncio.gather(*(client(n) for n in range(CLIENTS)))
            reloads, memory = await others
            plain = request_of("sum", [7])
            assert is_answer(await each[0].ModelInfer(plain), "sum", [7])
        assert not tally.wrong, tally.wrong[:5]
        assert sum(tally.ended.values()) == sum(tally.sent.values())
        assert tally.answered() >= ENOUGH
        await until(lambda: server.metric("convoy_inflight_requests") == server.metric("convoy_queue_depth") == 0)
        counted = server.metric("convoy_requests_total", code="OK")
        silent = sum(n for (_, code), n in tally.ended.items() if code in (None, LATE))
        assert tally.answered() + 1 <= counted <= tally.answered() + 1 + silent
    assert reloads
    assert server.process.returncode == 0
    # Warm by a third of the time: from there to the end less than a tenth more, and the noise of small servers.
    third = len(memory) // 3
    warm, last = statistics.median(memory[third : 2 * third]), statistics.median(memory[2 * third :])
    assert last < 1.1 * warm + 16 * 2**20, memory


async def until(true: Any) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def closed_loop(stub: Any, first: int, stop: asyncio.Event, ended: Counter[grpc.StatusCode]) -> None:
    """Sends one plain request after the other and counts how they end; a wrong answer fails the test."""
    number = first
    while not stop.is_set():
        try:
            response = await stub.ModelInfer(request_of("sum", [number]), timeout=LOST_AFTER_S)
            assert is_answer(response, "sum", [number])
            ended[OK] += 1
        except aio.AioRpcError as error:
            ended[error.code()] += 1
            await asyncio.sleep(0.01)
        number += CLIENTS


async def test_a_killed_engine_fails_its_batch_alone_and_comes_back(tmp_path: Path) -> None:
    batch = 4
    fake_model(tmp_path, config=f"max_batch_size: {batch}\ndynamic_batching {{ }}\n", seconds=0.05)
    ended: Counter[grpc.StatusCode] = Counter()
    stop = asyncio.Event()
    with ServeProcess(tmp_path) as server:
        async with stubs(server.url) as each:
            clients = [asyncio.create_task(closed_loop(each[n % CHANNELS], n, stop, ended)) for n in range(32)]
            await until(lambda: ended[OK] > 40)
            (victim,) = server.engines()
            os.kill(victim, signal.SIGKILL)
            await until(lambda: victim not in server.engines())
            before = ended[OK]
            await until(lambda: ended[OK] >= before + 40)
            stop.set()
            await asyncio.gather(*clients)
        assert set(ended) <= {OK, UNAVAILABLE}
        assert ended[UNAVAILABLE] <= batch
        assert server.metric("convoy_engine_restarts_total") == 1


@pytest.mark.parametrize("frontends", ["1", "2"])
async def test_sigterm_under_load_fails_nothing_that_was_accepted(tmp_path: Path, frontends: str) -> None:
    fake_model(tmp_path, config="max_batch_size: 4\ndynamic_batching { }\n", seconds=0.02)
    ended: Counter[grpc.StatusCode] = Counter()
    stop = asyncio.Event()
    with ServeProcess(tmp_path, "--log-requests", "--log-format", "json", frontends=frontends) as server:
        async with stubs(server.url) as each:
            clients = [asyncio.create_task(closed_loop(each[n % CHANNELS], n, stop, ended)) for n in range(64)]
            await until(lambda: ended[OK] > 100)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(server.process.wait, 120)
            stop.set()
            await asyncio.gather(*clients)
        served = Counter(line["code"] for line in server.requests())
    assert server.process.returncode == 0
    # What the server answered has arrived, and what did not was refused. gRPC itself cancels calls that reach it while
    # it tells its clients to go away: no handler has seen those.
    assert served["OK"] == ended[OK]
    assert set(served) <= {"OK", "UNAVAILABLE"}
    assert set(ended) <= {OK, UNAVAILABLE, grpc.StatusCode.CANCELLED}


@pytest.mark.parametrize("frontends", ["1", "2"])
async def test_a_crowd_is_answered_or_refused_and_never_just_cancelled(tmp_path: Path, frontends: str) -> None:
    fake_model(tmp_path, config="max_batch_size: 4\ndynamic_batching { }\n", seconds=0.01)
    ended: Counter[grpc.StatusCode] = Counter()

    async def one(stub: Any, number: int) -> None:
        try:
            response = await stub.ModelInfer(request_of("sum", [number]), timeout=LOST_AFTER_S)
            assert is_answer(response, "sum", [number])
            ended[OK] += 1
        except aio.AioRpcError as error:
            ended[error.code()] += 1

    with ServeProcess(tmp_path, "--max-queue", "4", frontends=frontends) as server:
        async with stubs(server.url) as each:
            await asyncio.gather(*(one(each[n % CHANNELS], n) for n in range(2000)))
        counted = server.metric("convoy_requests_total")
    assert set(ended) == {OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert ended.total() == counted == 2000
