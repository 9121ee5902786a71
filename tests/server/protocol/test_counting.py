"""Every way that an inference request can end, over gRPC and HTTP: each is counted once, as its client saw it."""

from __future__ import annotations

import asyncio
import json
import struct
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.frontend.grpc_frontend import methods, unknown
from convoynet.server.frontend.requests import Requests
from convoynet.server.memory.budget import Budget
from convoynet.server.protocol.dispatch import Reply
from convoynet.server.security.security import digest
from convoynet.server.types import Call, Timings
from tests.server import http_calls
from tests.server.conftest import Running, Serving, code_of, fake_model, infer_request
from tests.server.http_calls import sum_request
from tests.server.raw_http2 import HEADERS, RawClient
from tests.server.repositories import write_ensemble

METHOD = "/inference.GRPCInferenceService/"
INFER = "/v2/models/sum/infer"
SLOW = "/v2/models/slow/infer"


@dataclass(frozen=True)
class Counts:
    """What every counter says."""

    requests: Counter[tuple[str, str, str]]
    rejected: Counter[tuple[str, str]]
    outcomes: Counter[tuple[str, str]]

    def __sub__(self, before: Counts) -> Counts:
        return Counts(self.requests - before.requests, self.rejected - before.rejected, self.outcomes - before.outcomes)


def counts(running: Running) -> Counts:
    """Requests by model, protocol and code; refusals by model and reason; ModelStatistics by model and outcome."""
    found = Counts(Counter(), Counter(), Counter())
    for family in running.app._metrics.registry.collect():
        for sample in family.samples:
            labels = sample.labels
            if sample.name == "convoy_requests_total":
                found.requests[labels["model"], labels["protocol"], labels["code"]] += int(sample.value)
            elif sample.name == "convoy_rejected_total":
                found.rejected[labels["model"], labels["reason"]] += int(sample.value)
    for model in running.app.core:
        totals = model.statistics
        assert sum(totals.failures.values()) == totals.fail.count
        found.outcomes[model.spec.name, "success"] += totals.success.count
        for kind, count in totals.failures.items():
            found.outcomes[model.spec.name, kind] += count
    return found


@dataclass(frozen=True)
class Way:
    """One way to end, and what is to be counted: nothing else may be.

    Attributes:
        call: Makes one request, and sees its end.
        code: As the client sees it, by the name of a gRPC status.
        outcome: Of ModelStatistics; "" where no model is known.
        reason: Of convoy_rejected_total; "" for none.
        model: Whose it is; "" for none.
    """

    call: Callable[[Running], Awaitable[object]]
    code: str
    outcome: str = ""
    reason: str = ""
    model: str = "sum"


def infer(
    *rows: float, model: str = "sum", timeout: float | None = None, parameters: dict[str, int] | None = None
) -> Any:
    message = infer_request(*rows, model=model, **(parameters or {}))
    return lambda running: code_of(running.stub.ModelInfer(message, timeout=timeout))


def changed(change: Callable[[pb.ModelInferRequest], object]) -> Any:
    """A request in which something is changed."""

    def call(running: Running) -> Any:
        message = infer_request(1)
        change(message)
        return code_of(running.stub.ModelInfer(message))

    return call


def payload(data: bytes, method: str = "ModelInfer") -> Any:
    return lambda running: code_of(running.channel.unary_unary(METHOD + method)(data))


def messages(*several: bytes) -> Any:
    """A call of one request with none, or several."""
    return lambda running: code_of(running.channel.stream_unary(METHOD + "ModelInfer")(iter(several)))


async def inflight(running: Running, model: str, count: int = 1) -> None:
    await running.until(lambda m: m.inflight >= count, model)


async def cancelled(running: Running) -> None:
    with running.held("slow"):
        call = running.stub.ModelInfer(infer_request(1, model="slow"))
        await inflight(running, "slow")
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await running.until(lambda m: not m.inflight, "slow")


async def late(running: Running) -> tuple[grpc.StatusCode, str]:
    """Its client's deadline passes while it runs."""
    message = infer_request(1, model="slow")
    with running.held("slow"):
        return await running.late(lambda seconds: running.stub.ModelInfer(message, timeout=seconds), "slow"), ""


async def timed_out(running: Running) -> object:
    """Its own timeout does."""
    with running.held("slow"):
        return await infer(1, model="slow", timeout=60, parameters={"timeout": 100_000})(running)


def region(message: pb.ModelInferRequest, size: int, name: str = "r") -> None:
    """Asks for the output in shared memory."""
    output = message.outputs.add(name="y")
    output.parameters["shared_memory_region"].string_param = name
    output.parameters["shared_memory_byte_size"].int64_param = size


def post(body: object, path: str = INFER, method: str = "POST", **headers: str) -> Any:
    return lambda running: http_calls.call(
        running.app.http_port, method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
    )


def raw(text: str) -> Any:
    """Bytes as they are, and the connection's end."""

    async def send(running: Running) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.app.http_port)
        try:
            writer.write(text.encode())
            return await reader.read()
        finally:
            writer.close()

    return send


async def hung_up(running: Running) -> None:
    body = json.dumps(sum_request(1)).encode()
    head = f"POST {SLOW} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", running.app.http_port)
    with running.held("slow"):
        writer.write(head.encode() + body)
        await inflight(running, "slow")
        writer.transport.abort()
        await running.until(lambda m: not m.inflight, "slow")


WRONG_SHAPE = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}
TOO_SHORT = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2]}]}
GRPC = {
    "answered": Way(infer(1), "OK", "success"),
    "answered twice from the cache": Way(infer(1, model="cached"), "OK", "success", model="cached"),
    "no message of the protocol": Way(payload(b"\xff\xff\xff"), "INVALID_ARGUMENT", model=""),
    "a method that there is not": Way(payload(b"", "ModelGuess"), "UNIMPLEMENTED", model=""),
    "a model that there is not": Way(infer(1, model="none"), "NOT_FOUND", model=""),
    "a version that there is not": Way(
        changed(lambda m: setattr(m, "model_version", "9")), "NOT_FOUND", model=""
    ),
    "a version that is none": Way(
        changed(lambda m: setattr(m, "model_version", "x")), "INVALID_ARGUMENT", model=""
    ),
    "a wrong shape": Way(changed(lambda m: m.inputs[0].shape.append(1)), "INVALID_ARGUMENT", "OTHER"),
    "a wrong parameter": Way(infer(1, parameters={"priority": -1}), "INVALID_ARGUMENT", "OTHER"),
    "a region that there is not": Way(changed(lambda m: region(m, 4, "none")), "NOT_FOUND", "OTHER"),
    "an answer that has no room in its region": Way(changed(lambda m: region(m, 2)), "INVALID_ARGUMENT", "OTHER"),
    "an answer in its region": Way(changed(lambda m: region(m, 4)), "OK", "success"),
    "an engine that fails": Way(infer(1000), "INTERNAL", "BACKEND"),
    "the client's own deadline": Way(
        late, "DEADLINE_EXCEEDED", "CANCELED or REJECTED", "deadline", "slow"
    ),
    "its timeout": Way(
        timed_out,
        "DEADLINE_EXCEEDED", "REJECTED", "deadline", "slow",
    ),
    "a client that goes away": Way(cancelled, "CANCELLED", "CANCELED", "cancelled", "slow"),
    "more than a message may have": Way(payload(bytes(300_000)), "RESOURCE_EXHAUSTED", "", "oversize", ""),
    "no message at all": Way(messages(), "", model=""),
    "an answer of more than a message may have": Way(
        infer(1, model="wide"), "RESOURCE_EXHAUSTED", "OTHER", model="wide"
    ),
}  # fmt: skip
HTTP = {
    "answered": Way(post(sum_request(1)), "OK", "success"),
    "broken JSON": Way(post(b'{"inputs": ['), "INVALID_ARGUMENT", "OTHER"),
    "data too short for its shape": Way(post(TOO_SHORT), "INVALID_ARGUMENT", "OTHER"),
    "a wrong shape": Way(post(WRONG_SHAPE), "INVALID_ARGUMENT", "OTHER"),
    "a header length beyond the body": Way(
        post(b"{}", inference_header_content_length="99"), "INVALID_ARGUMENT", "OTHER"
    ),
    "an encoding that is none": Way(post(b"x", content_encoding="br"), "", "OTHER"),
    "a body that is too large": Way(post(bytes(300_000)), "", "OTHER", "oversize"),
    "a model that there is not": Way(post(sum_request(1), "/v2/models/none/infer"), "NOT_FOUND", model=""),
    "a path that there is not": Way(post(b"", "/v2/nothing"), "", model=""),
    "a method that there is not": Way(post(b"", INFER, "PUT"), "", model=""),
    "an engine that fails": Way(post(sum_request(1000)), "INTERNAL", "BACKEND"),
    "no HTTP": Way(raw("hello\r\n\r\n"), "", model=""),
    "a client that hangs up": Way(hung_up, "CANCELLED", "CANCELED", "cancelled", "slow"),
}


def models(root: Path) -> None:
    fake_model(root, fail_above=500)
    fake_model(root, "slow", seconds=0.5)
    fake_model(root, "cached", config="max_batch_size: 8 response_cache { enable: true }")
    wide_model(root, 75_000)


def wide_model(root: Path, numbers: int, seconds: float = 0.0) -> None:
    """A model "wide" that answers each row with so many numbers."""
    fake_model(root, "wide", seconds=seconds)
    config = root / "wide" / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [1] }", f"dims: [{numbers}] }}"))


@contextmanager
def shared_object() -> Iterator[str]:
    path = Path("/dev/shm") / f"convoy-test-{uuid.uuid4().hex}"
    path.write_bytes(bytes(4096))
    try:
        yield path.name
    finally:
        path.unlink()


async def settled(running: Running, before: Counts, calls: int = 1) -> Counts:
    """What was counted since; what ends a call may be a little behind its client."""
    for _ in range(6000):  # a minute at least
        if (counts(running) - before).requests.total() >= calls:
            await asyncio.sleep(0.02)  # for what should not follow
            break
        await asyncio.sleep(0.01)
    return counts(running) - before


@pytest.mark.parametrize("stack", ["native", "frontends", "grpcio", "http"])
async def test_every_way_to_end_is_counted_once(serving: Serving, tmp_path: Path, stack: str) -> None:
    models(tmp_path)
    settings: dict[str, Any] = {"frontends": {"frontends": "2"}, "grpcio": {"grpc_stack": "grpcio"}}.get(stack, {})
    common = {"allow_client_shm": True, "max_message_bytes": 200_000, "response_cache_bytes": 2**20}
    wrong = {}
    with shared_object() as key:
        async with serving(**common, **settings) as running:
            register = pb.SystemSharedMemoryRegisterRequest(name="r", key=key, byte_size=4096)
            await running.stub.SystemSharedMemoryRegister(register)
            for name, way in (HTTP if stack == "http" else GRPC).items():
                before = counts(running)
                ended = await way.call(running)
                found = await settled(running, before)
                code = way.code or (found_code(found) if stack == "http" else ended[0].name)
                protocol = "http" if stack == "http" else "grpc"
                expected = (
                    Counter({(way.model, protocol, code): 1}),
                    Counter({(way.model, way.reason): 1} if way.reason else {}),
                    Counter({(way.model, found_outcome(found, way)): 1} if way.outcome else {}),
                )
                if (found.requests, found.rejected, found.outcomes) != expected:
                    wrong[name] = (ended, found, expected)
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


def found_outcome(found: Counts, way: Way) -> str:
    """The outcome, or the one of two that was counted: the client's timer and the server's race."""
    return next((kind for _, kind in found.outcomes if kind in way.outcome), way.outcome)


def found_code(found: Counts) -> str:
    """The one code that was counted, which HTTP says in another way; it is no success."""
    codes = {key[2] for key in found.requests}
    return codes.pop() if len(codes) == 1 and not codes & {"OK", "CANCELLED"} else "no single error"


async def test_requests_without_rights_or_room_are_counted(serving: Serving, tmp_path: Path) -> None:
    models(tmp_path)
    tokens = tmp_path.parent / "tokens"
    tokens.write_text(f"alice read {digest('secret')}\n")
    async with serving(auth_tokens=tokens) as running:
        before = counts(running)
        await infer(1)(running)
        await post(sum_request(1))(running)
        await post(sum_request(1), authorization="Bearer secret")(running)
        found = counts(running) - before
        assert found.requests == {
            ("", "grpc", "UNAUTHENTICATED"): 1,
            ("sum", "http", "UNAUTHENTICATED"): 1,
            ("sum", "http", "PERMISSION_DENIED"): 1,
        }
        assert found.rejected == {("", "auth"): 3}


@pytest.mark.parametrize("frontends", ["1", "2"])
async def test_a_message_of_a_stream_that_cannot_be_taken_ends_it_and_is_counted(
    serving: Serving, tmp_path: Path, frontends: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Too large, or compressed as it says and not as it is; what came before is answered."""
    fake_model(tmp_path)
    good = infer_request(1).SerializeToString()
    first = struct.pack(">BI", 0, len(good)) + good
    async with serving(frontends=frontends, max_message_bytes=200_000) as running:
        for bad, code, reason in (
            (struct.pack(">BI", 0, 300_000), "RESOURCE_EXHAUSTED", "oversize"),
            (struct.pack(">BI", 1, 3) + b"abc", "INVALID_ARGUMENT", ""),
            (struct.pack(">BI", 0, 3) + b"a", "INVALID_ARGUMENT", ""),
        ):
            before = counts(running)
            client = await RawClient.connect(running.app.grpc_port)
            client.call("ModelStreamInfer", first + bad, end=not reason, more={"grpc-encoding": "gzip"})
            answer = await client.answer()
            assert answer.status == str(grpc.StatusCode[code].value[0])
            assert len(answer.data) > 5
            found = await settled(running, before, 2)
            assert found.requests == {("sum", "grpc", "OK"): 1, ("", "grpc", code): 1}
            assert found.rejected == ({("", reason): 1} if reason else {})
            client.close()
    assert "a bug" not in caplog.text


@pytest.mark.parametrize("frontends", ["1", "2"])
async def test_a_deadline_within_a_request_is_counted(serving: Serving, tmp_path: Path, frontends: str) -> None:
    fake_model(tmp_path)
    async with serving(frontends=frontends) as running:
        before = counts(running)
        client = await RawClient.connect(running.app.grpc_port)
        client.call("ModelInfer", struct.pack(">BI", 0, 60_000) + bytes(10_000), more={"grpc-timeout": "100m"})
        assert await client.until(HEADERS, 1)
        client.close()
        found = await settled(running, before)
        assert found.requests == {("", "grpc", "DEADLINE_EXCEEDED"): 1}
        assert found.rejected == {("", "deadline"): 1}


STACKS = pytest.mark.parametrize(
    ("stack", "frontends"),
    [(stack, count) for stack in ("native", "grpcio") for count in ("1", "2")],
)


@STACKS
async def test_calls_for_which_there_is_no_room_are_counted_as_their_clients_see_them(
    serving: Serving, tmp_path: Path, stack: str, frontends: str
) -> None:
    """For a request, and for an answer that its model has given."""
    wide_model(tmp_path, 75_000, seconds=0.3)
    async with serving(grpc_stack=stack, frontends=frontends, max_inflight_bytes=2**20 * int(frontends)) as running:
        before = counts(running)
        assert (await infer(1, model="wide")(running))[0].name == "OK"  # 300 kB
        assert (await infer(*[1] * 4, model="wide")(running))[0].name == "RESOURCE_EXHAUSTED"
        found = await settled(running, before, 2)
        assert found.requests == {("wide", "grpc", "OK"): 1, ("wide", "grpc", "RESOURCE_EXHAUSTED"): 1}
        assert found.rejected == {("", "memory"): 1}
        assert found.outcomes == {("wide", "success"): 1, ("wide", "OTHER"): 1}
        before = counts(running)
        large = infer_request(1, model="wide")
        large.id = "x" * 2**16  # whose text counts nine times
        asked = [code_of(running.stub.ModelInfer(large)) for _ in range(6)]
        ended = Counter([code.name for code, _ in await asyncio.gather(*asked)])
        found = await settled(running, before, 6)
        by_code: Counter[str] = Counter()
        for (_, _, code), count in found.requests.items():
            by_code[code] += count
        assert by_code == ended
        assert found.rejected == {("", "memory"): ended["RESOURCE_EXHAUSTED"]}


async def test_a_full_queue_and_a_stop_are_counted(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, seconds=0.3, config="max_batch_size: 1")
    async with serving(max_queue=1) as running:
        before = counts(running)
        codes = Counter([code.name for code, _ in await asyncio.gather(*(infer(1)(running) for _ in range(6)))])
        found = counts(running) - before
        assert found.requests == {("sum", "grpc", code): count for code, count in codes.items()}
        assert found.rejected == {("sum", "queue_full"): codes["RESOURCE_EXHAUSTED"]}
        assert found.outcomes == {("sum", "success"): codes["OK"], ("sum", "REJECTED"): codes["RESOURCE_EXHAUSTED"]}
        running.app.core.model("sum")._scheduler.close()  # type: ignore[attr-defined]
        await infer(1)(running)
        assert (counts(running) - before).requests["sum", "grpc", "UNAVAILABLE"] == 1
        assert (counts(running) - before).rejected["sum", "draining"] == 1


async def test_each_request_of_a_stream_is_counted(serving: Serving, tmp_path: Path) -> None:
    models(tmp_path)
    async with serving(max_message_bytes=200_000) as running:
        before = counts(running)

        async def requests() -> AsyncIterator[pb.ModelInferRequest]:
            for model in ("sum", "none", "wide", "sum"):
                yield infer_request(1, model=model)

        answers = [answer async for answer in running.stub.ModelStreamInfer(requests())]
        assert [bool(answer.error_message) for answer in answers] == [False, True, True, False]
        assert "300" in answers[2].error_message
        assert (counts(running) - before).requests == {
            ("sum", "grpc", "OK"): 2,
            ("", "grpc", "NOT_FOUND"): 1,
            ("wide", "grpc", "RESOURCE_EXHAUSTED"): 1,
        }
        before = counts(running)
        stream = running.stub.ModelStreamInfer()
        with running.held("slow"):
            for _ in range(3):
                await stream.write(infer_request(1, model="slow"))
            await inflight(running, "slow", 3)
            stream.cancel()
            await running.until(lambda m: not m.inflight, "slow")
        found = await settled(running, before)
        assert found.requests == {("slow", "grpc", "CANCELLED"): 3}
        assert found.outcomes == {("slow", "CANCELED"): 3}


async def test_what_the_cache_answers_is_counted_as_triton_does(serving: Serving, tmp_path: Path) -> None:
    models(tmp_path)
    async with serving(response_cache_bytes=2**20, metrics_aliases="triton") as running:
        for _ in range(10):
            await running.stub.ModelInfer(infer_request(1, 2, model="cached"))
        (stats,) = (await running.stub.ModelStatistics(pb.ModelStatisticsRequest(name="cached"))).model_stats
        part = stats.inference_stats
        assert (part.success.count, part.fail.count, part.queue.count) == (10, 0, 10)
        assert (part.cache_hit.count, part.cache_miss.count) == (9, 1)
        assert (stats.inference_count, stats.execution_count, part.compute_infer.count) == (2, 1, 1)
        assert min(part.cache_hit.ns, part.cache_miss.ns) > 0
        labels = {"model": "cached", "version": "1"}
        for name, count in {
            "convoy_response_cache_hits_total": 9,
            "convoy_response_cache_misses_total": 1,
            "convoy_inferences_total": 2,
            "nv_inference_request_success": 10,
            "nv_cache_num_hits_per_model": 9,
            "nv_cache_num_misses_per_model": 1,
        }.items():
            assert running.metric(name, **labels) == count, name
        message = infer_request(1, 2, model="cached")
        message.parameters["convoy_timings"].bool_param = True
        times = (await running.stub.ModelInfer(message)).parameters
        assert all(value.int64_param >= 0 for value in times.values())


async def test_an_ensemble_and_its_steps_are_counted_each_for_itself(serving: Serving, tmp_path: Path) -> None:
    models(tmp_path)
    tensor = "data_type: TYPE_FP32 dims"
    write_ensemble(tmp_path, "both", [("sum", "x", "y")])
    config = tmp_path / "both" / "config.pbtxt"
    config.write_text(config.read_text().replace(f"{tensor}: [1] }} output", f"{tensor}: [4] }} output"))
    async with serving() as running:
        before = counts(running)
        await infer(1, model="both")(running)
        await infer(1000, model="both")(running)
        await infer(*[1] * 5, model="both")(running)
        found = counts(running) - before
        assert found.requests == {
            ("both", "grpc", "OK"): 1,
            ("both", "grpc", "INTERNAL"): 1,
            ("both", "grpc", "INVALID_ARGUMENT"): 1,
        }
        assert found.outcomes == {
            ("both", "success"): 1,
            ("both", "BACKEND"): 1,
            ("both", "OTHER"): 1,
            ("sum", "success"): 1,
            ("sum", "BACKEND"): 1,
        }


async def test_what_ends_after_its_model_was_unloaded_makes_no_series(serving: Serving, tmp_path: Path) -> None:
    models(tmp_path)
    async with serving(model_control_mode="explicit", load_model=("sum",)) as running:
        await infer(1)(running)
        ended = running.app.core.model("sum")
        await running.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="sum"))
        assert ended.labels == ("", "")
        ended.count(Timings(), 1, asyncio.CancelledError(), late=False)
        assert not [key for key in counts(running).rejected if key[0] == "sum"]


async def test_a_refusal_is_counted_before_its_client_hears_of_it() -> None:
    """Whoever is refused may look at the metrics at once."""
    told: list[str] = []

    class Refusing:
        def refused(self, rpc: str, call: Call) -> Reply:
            return Reply(grpc.StatusCode.UNAUTHENTICATED, message="no token")

        def over(self, rpc: str, call: Call) -> None:
            if not call.counted:
                call.counted = True
                told.append(rpc)

    class Context:
        def time_remaining(self) -> None:
            return None

        def invocation_metadata(self) -> tuple[()]:
            return ()

        async def abort(self, code: grpc.StatusCode, *_: object) -> None:
            told.append(code.name)
            raise aio.AbortError

    answers: Any = Refusing()
    with pytest.raises(aio.AbortError):
        await methods(answers, Requests(Budget()), Budget())["ModelInfer"].stream_unary(b"", Context())
    assert told == ["ModelInfer", "UNAUTHENTICATED"]
    told.clear()
    with pytest.raises(aio.AbortError):
        await unknown(answers).stream_unary(b"", Context())
    assert told == ["", "UNIMPLEMENTED"]
