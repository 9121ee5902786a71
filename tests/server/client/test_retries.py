"""Calls that are sent again: where the server asks for it, within their time, and never otherwise."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.client.async_client import AsyncClient
from convoynet.server.client.client import Client, ClientError
from convoynet.server.client.retries import PUSHBACK, Attempts
from tests.server import onnx_models
from tests.server.process import ServeProcess

Answer = tuple[grpc.StatusCode, str] | None
FULL, LOADING = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE


class Script:
    """A gRPC server that gives the answers it is told to, in order: a code and the push-back, if any, or success."""

    def __init__(self) -> None:
        self.answers: deque[Answer] = deque()
        self.calls = 0
        self.server = grpc.server(ThreadPoolExecutor(2))
        handler = grpc.unary_unary_rpc_method_handler(self._answer)
        self.server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ServerMetadata": handler})]
        )
        self.url = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def _answer(self, request: bytes, context: Any) -> bytes:
        self.calls += 1
        if (answer := self.answers.popleft()) is None:
            return pb.ServerMetadataResponse(name="scripted").SerializeToString()
        code, pushback = answer
        if pushback:
            context.set_trailing_metadata(((PUSHBACK, pushback),))
        return context.abort(code, "refused")


@pytest.fixture(scope="module")
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.server.stop(None).wait()


async def ask(kind: str, url: str, **arguments: Any) -> str:
    """The name of the server, or the status."""
    try:
        if kind == "blocking":
            with Client(url, **arguments) as client:
                return (await asyncio.to_thread(client.server_metadata)).name
        async with AsyncClient(url, **arguments) as other:
            return (await other.server_metadata()).name
    except ClientError as error:
        return error.code.name


CASES: dict[str, tuple[list[Answer], str, int]] = {
    "at once": ([None], "scripted", 1),
    "a full queue": ([(FULL, "1"), None], "scripted", 2),
    "a model that loads": ([(LOADING, "1"), (LOADING, "0"), None], "scripted", 3),
    "three times and no more": ([(FULL, "1")] * 4, FULL.name, 4),
    "a server that does not ask": ([(FULL, "")], FULL.name, 1),
    "nor there": ([(LOADING, "")], LOADING.name, 1),
    "a server that says never": ([(FULL, "-1")], FULL.name, 1),
    "no number": ([(FULL, "soon")], FULL.name, 1),
    "another status": ([(grpc.StatusCode.INTERNAL, "1")], "INTERNAL", 1),
    "a refusal for good after one for now": ([(FULL, "1"), (grpc.StatusCode.NOT_FOUND, "")], "NOT_FOUND", 2),
    "longer than the time": ([(FULL, "290000")], FULL.name, 1),
    "an hour": ([(FULL, "3600000")], FULL.name, 1),
}
"""Why -> what the server answers in turn, what comes out, and after how many calls."""


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
@pytest.mark.parametrize("why", CASES)
async def test_a_call_is_sent_again_as_the_server_asks(script: Script, kind: str, why: str) -> None:
    answers, outcome, calls = CASES[why]
    script.answers, script.calls = deque(answers), 0
    timeout = None if why == "an hour" else 250
    assert (await ask(kind, script.url, timeout=timeout), script.calls) == (outcome, calls)


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
async def test_retries_can_be_turned_off_and_are_checked(script: Script, kind: str) -> None:
    script.answers, script.calls = deque([(FULL, "1")]), 0
    assert (await ask(kind, script.url, retries=0), script.calls) == (FULL.name, 1)
    for wrong in (-1, 1.5, "3", None, True):
        assert await ask(kind, script.url, retries=wrong) == "INVALID_ARGUMENT"


class Refusal(grpc.RpcError):
    def __init__(self, milliseconds: int) -> None:
        self.milliseconds = milliseconds

    def code(self) -> grpc.StatusCode:
        return FULL

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((PUSHBACK, str(self.milliseconds)),)


def test_waits_are_spread_and_never_shorter_than_asked_for() -> None:
    waits = [Attempts(None, 1).wait_s(Refusal(1000)) for _ in range(100)]
    assert all(wait is not None and 1 <= wait <= 1.25 for wait in waits)
    assert len(set(waits)) > 50


def test_each_attempt_has_what_is_left_of_the_time() -> None:
    attempts = Attempts(3600, 3)
    assert 3500 < (attempts.timeout() or 0) <= 3600
    assert Attempts(None, 3).timeout() is None
    assert Attempts(0, 3).timeout() == 0
    assert Attempts(0, 3).wait_s(Refusal(0)) is None


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """A real server that lets one request wait."""
    repository = tmp_path_factory.mktemp("retries") / "models"
    onnx_models.write_slow(repository, size=128, loops=50)
    with ServeProcess(repository, "--max-queue", "1", "--no-tune", "--threads", "1") as server:
        yield server


def crowd(ask: Callable[[int], str]) -> list[str]:
    barrier = threading.Barrier(8)

    def one(number: int) -> str:
        barrier.wait()
        return ask(number)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(8)))


def test_a_crowd_is_answered_by_a_server_with_a_short_queue(crowded: ServeProcess) -> None:
    with Client(crowded.url, retries=100_000) as client:

        def ask(number: int) -> str:
            for step in range(4):
                value = np.full((1, 1), 10 * number + step, np.float32)
                assert client.infer("slow", {"input": value})["logits"].tolist() == value.tolist()
            return "answered"

        assert crowd(ask) == ["answered"] * 8
    assert crowded.metric("convoy_rejected_total", reason="queue_full") > 0


async def test_tasks_share_one_client_and_get_their_own_answers(crowded: ServeProcess) -> None:
    async with AsyncClient(crowded.url, retries=100_000) as client:
        values = [np.full((1, 1), number, np.float32) for number in range(16)]
        answers = await asyncio.gather(*(client.infer("slow", {"input": value}) for value in values))
        assert [answer["logits"].tolist() for answer in answers] == [value.tolist() for value in values]


def test_a_model_that_loads_says_when_to_ask_again(tmp_path: Path) -> None:
    from convoynet.server.errors import LOADING_S, EngineLost, ModelNotReady, OverBudget
    from convoynet.server.protocol.dispatch import Dispatcher

    dispatcher = Dispatcher([])
    for error, milliseconds in [
        (ModelNotReady("model 'm' is loading", LOADING_S), "1000"),
        (EngineLost("m"), "1000"),
        (OverBudget(5, 7, 9), "100"),
    ]:
        assert dispatcher.refusal(error).trailers == ((PUSHBACK, milliseconds),)
    for error in (ModelNotReady("model 'm' failed to load"), OverBudget(50, 7, 9)):
        assert dispatcher.refusal(error).trailers == ()
