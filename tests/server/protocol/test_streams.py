"""ModelStreamInfer: order, concurrency, errors and endings."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidRequest
from convoynet.server.protocol import dispatch
from convoynet.server.protocol.dispatch import Dispatcher, Reply
from convoynet.server.types import Call
from tests.server.conftest import Serving, code_of, fake_model, infer_request, sums


class Scripted:
    """A service whose answers come when the test says so."""

    def __init__(self) -> None:
        self.let: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.running: set[str] = set()
        self.cancelled: set[str] = set()

    async def ModelInfer(self, request: pb.ModelInferRequest, call: Call) -> pb.ModelInferResponse:
        self.running.add(request.id)
        try:
            await self.let[request.id].wait()
        except asyncio.CancelledError:
            self.cancelled.add(request.id)
            raise
        finally:
            self.running.discard(request.id)
        if request.model_name == "bad":
            raise InvalidRequest("no")
        return pb.ModelInferResponse(id=request.id)


async def _payloads(*names: str, model: str = "m") -> AsyncIterator[bytes]:
    for name in names:
        yield pb.ModelInferRequest(model_name="bad" if name.startswith("bad") else model, id=name).SerializeToString()


async def _settle() -> None:
    """Lets every task run until it waits."""
    for _ in range(300):
        await asyncio.sleep(0)


def _read(reply: Reply) -> pb.ModelStreamInferResponse:
    return pb.ModelStreamInferResponse.FromString(reply.payload)


async def test_answers_come_in_order_while_requests_run_side_by_side() -> None:
    service = Scripted()
    heard: list[str] = []

    async def hear() -> None:
        async for reply in Dispatcher([service]).stream("ModelStreamInfer", _payloads("a", "b", "c"), Call("grpc")):
            answer = _read(reply).infer_response
            assert answer.parameters["triton_final_response"].bool_param
            heard.append(answer.id)

    task = asyncio.create_task(hear())
    await _settle()
    assert service.running == {"a", "b", "c"}
    service.let["c"].set()
    service.let["b"].set()
    await _settle()
    assert (heard, service.running) == ([], {"a"})
    service.let["a"].set()
    await task
    assert heard == ["a", "b", "c"]


async def test_so_many_requests_of_a_stream_run_at_once() -> None:
    service = Scripted()
    names = [str(n) for n in range(dispatch.STREAM_INFLIGHT + 10)]
    stream = Dispatcher([service]).stream("ModelStreamInfer", _payloads(*names), Call("grpc"))
    first = asyncio.ensure_future(anext(stream))
    await _settle()
    assert service.running == set(names[: dispatch.STREAM_INFLIGHT])
    service.let["0"].set()
    await first
    second = asyncio.ensure_future(anext(stream))
    await _settle()
    assert service.running == set(names[1 : dispatch.STREAM_INFLIGHT + 1])
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    await stream.aclose()
    assert service.running == set()
    assert names[1] in service.cancelled


async def test_an_error_is_an_answer_of_its_own() -> None:
    service = Scripted()
    for name in ("a", "bad1", "c"):
        service.let[name].set()
    stream = Dispatcher([service]).stream("ModelStreamInfer", _payloads("a", "bad1", "c"), Call("grpc"))
    heard = [_read(reply) async for reply in stream]
    assert [(h.infer_response.id, h.error_message) for h in heard] == [
        ("a", ""),
        ("bad1", "[request id: bad1] no"),
        ("c", ""),
    ]


async def test_an_error_ends_the_stream_where_the_client_asks_for_that() -> None:
    service = Scripted()
    for name in ("a", "bad1"):
        service.let[name].set()
    call = Call("grpc", metadata=(("triton_grpc_error", "true"),))
    stream = Dispatcher([service]).stream("ModelStreamInfer", _payloads("a", "bad1", "c"), call)
    heard = [reply async for reply in stream]
    assert [reply.code.name for reply in heard] == ["OK", "INVALID_ARGUMENT"]
    assert heard[-1].message == "[request id: bad1] no"
    assert service.running == set()


async def test_what_is_no_request_is_an_error_of_its_own() -> None:
    async def payloads() -> AsyncIterator[bytes]:
        yield b"\xff"

    heard = [_read(r) async for r in Dispatcher([]).stream("ModelStreamInfer", payloads(), Call("grpc"))]
    assert heard[0].error_message == "the payload is not a ModelInferRequest"


async def test_streams_over_grpc(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    wrong = infer_request(1)
    wrong.inputs[0].name = "zz"
    async with serving() as running:
        requests = [infer_request(n) for n in range(20)]
        heard = [m async for m in running.stub.ModelStreamInfer(iter([*requests, wrong, infer_request(7)]))]
        assert [sums(m.infer_response) for m in heard[:20]] == [[n] for n in range(20)]
        assert "unexpected inference input 'zz'" in heard[20].error_message
        assert sums(heard[21].infer_response) == [7]
        call = running.stub.ModelStreamInfer(iter([wrong]), metadata=(("triton_grpc_error", "true"),))
        assert (await code_of(call.read()))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_client_that_goes_away_leaves_nothing_behind(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, seconds=0.05, config="max_batch_size: 1\n")
    async with serving() as running:
        call = running.stub.ModelStreamInfer()
        for n in range(10):
            await call.write(infer_request(n))
        assert sums((await call.read()).infer_response) == [0]
        call.cancel()
        assert sums(await running.stub.ModelInfer(infer_request(3))) == [3]
        assert sum(m.inflight for m in running.app.core) == 0
