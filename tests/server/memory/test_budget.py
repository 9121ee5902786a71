"""The budget of bytes: what is counted, over every port, what is refused, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc import aio
from PIL import Image

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc
from convoynet.server.errors import OverBudget
from convoynet.server.memory.budget import SLACK_BYTES, SMALL_BYTES, Budget, resident_bytes
from tests.server.conftest import Running, Serving, code_of, sums
from tests.server.http_calls import call
from tests.server.test_serve import Served

STACKS = pytest.mark.parametrize(
    ("stack", "frontends"),
    [(stack, count) for stack in ("native", "grpcio") for count in ("1", "2")],
)
SIZE = 500_000
REASON = {"model": "", "version": "", "reason": "memory"}


def test_what_is_taken_is_given_back() -> None:
    refused: list[int] = []
    budget = Budget(100, lambda: refused.append(1))
    budget.take(60)
    with budget.holding(40):
        assert budget.held == 100
        with pytest.raises(OverBudget, match=r"no room for 1 bytes more: it holds 100 of the 100 bytes .* later"):
            budget.take(1)
    with pytest.raises(OverBudget, match="send less at once"):
        budget.take(101)
    budget.give(60)
    assert (budget.held, len(refused)) == (0, 2)


def test_the_last_sixteenth_is_for_what_is_small() -> None:
    budget = Budget(16 * SMALL_BYTES)
    budget.take(14 * SMALL_BYTES)
    budget.take(1000, whole=SMALL_BYTES)
    assert (budget.fits(SMALL_BYTES), budget.fits(1, whole=SMALL_BYTES)) == (False, True)
    with pytest.raises(OverBudget, match=f"of the {15 * SMALL_BYTES} bytes .* later"):
        budget.take(SMALL_BYTES)
    for _ in range(3):
        budget.take(SMALL_BYTES // 2)
    assert (budget.fits(SMALL_BYTES // 2 - 1000), budget.fits(SMALL_BYTES // 2)) == (True, False)
    with pytest.raises(OverBudget, match=f"of the {15 * SMALL_BYTES} bytes .* send less"):
        budget.take(15 * SMALL_BYTES + 1)


def test_the_process_may_grow_by_twice_the_limit_while_something_is_held_or_read() -> None:
    resident = 10**9
    budget = Budget(SLACK_BYTES, resident=lambda: resident)

    def grown(by: int) -> bool:
        nonlocal resident
        resident += by
        budget._looked = 0.0
        try:
            budget.check_process()
        except OverBudget:
            return False
        return True

    assert grown(10 * SLACK_BYTES)  # models, say: nobody has sent anything
    budget.reading = 1
    assert grown(SLACK_BYTES + SLACK_BYTES // 4)
    assert not grown(1)
    budget.reading = 0
    assert not grown(0)  # what was given up is still on its way out
    budget._read -= 1.0
    assert grown(0)
    for _ in range(4096):
        budget.take(SLACK_BYTES // 4096)
    budget._read -= 1.0
    assert grown(SLACK_BYTES)
    assert not grown(SLACK_BYTES // 4 + 1)  # what is held is not the process's own
    budget._read -= 1.0
    assert grown(0)


def test_reads_that_are_given_up_again_and_again_do_not_raise_what_the_process_may_have() -> None:
    resident = start = 10**9
    budget = Budget(100, resident=lambda: resident)
    budget.check_process()
    for _ in range(50):
        budget._looked = 0.0
        with suppress(OverBudget):
            budget.check_process()
            budget.reading = 1
            resident += SLACK_BYTES // 8
            budget.reading = 0  # it was given up; nothing of it is free yet
    assert resident - start <= 100 + SLACK_BYTES // 4 + SLACK_BYTES // 8


def test_the_memory_of_this_process_is_known() -> None:
    before = resident_bytes()
    filled = np.ones(50_000_000, np.uint8)
    assert resident_bytes() - before > 0.9 * filled.nbytes


def wide_model(root: Path, *, seconds: float = 0.0, output: int = 1) -> None:
    """A model that takes rows of any width, and answers with so many numbers."""
    folder = root / "sum" / "1"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(f'{{"seconds": {seconds}}}')
    (root / "sum" / "config.pbtxt").write_text(
        'backend: "fake"\nmax_batch_size: 1\ninput { name: "x" data_type: TYPE_FP32 dims: [-1] }\n'
        f'output {{ name: "y" data_type: TYPE_FP32 dims: [{output}] }}\n'
    )


def request(size: int = SIZE) -> pb.ModelInferRequest:
    """A request of about so many bytes."""
    message = pb.ModelInferRequest(model_name="sum", raw_input_contents=[bytes(size // 4 * 4)])
    message.inputs.add(name="x", datatype="FP32", shape=[1, size // 4])
    return message


async def nothing_is_held(running: Running) -> None:
    """Waits until everything was given back."""
    while running.app._budget.held:
        await asyncio.sleep(0.005)


@STACKS
async def test_unary_calls(serving: Serving, tmp_path: Path, stack: str, frontends: str) -> None:
    wide_model(tmp_path)
    async with serving(grpc_stack=stack, frontends=frontends, max_inflight_bytes=6 * SIZE) as running:
        with running.held():
            calls = [asyncio.ensure_future(code_of(running.stub.ModelInfer(request()))) for _ in range(20)]
            while not any(call.done() for call in calls):
                await asyncio.sleep(0.005)
        codes = [(await call)[0] for call in calls]
        refused = codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert codes.count(grpc.StatusCode.OK) == 20 - refused
        assert 20 > refused > 0
        while running.metric("convoy_rejected_total", **REASON) < refused:
            await asyncio.sleep(0.005)
        assert running.metric("convoy_rejected_total", **REASON) == refused
        counted = {"model": "", "version": "", "protocol": "grpc", "code": "RESOURCE_EXHAUSTED"}
        assert running.metric("convoy_requests_total", **counted) == refused
        await nothing_is_held(running)
        assert await code_of(running.stub.ModelInfer(request())) == (grpc.StatusCode.OK, "")


@STACKS
async def test_streams(serving: Serving, tmp_path: Path, stack: str, frontends: str) -> None:
    wide_model(tmp_path, seconds=0.05)
    async with serving(grpc_stack=stack, frontends=frontends, max_inflight_bytes=6 * SIZE) as running:
        with running.held() if stack == "grpcio" else nullcontext():  # the other's streams wait for room
            stream, answers = running.stub.ModelStreamInfer(iter([request()] * 20)), []
            while stack == "grpcio" and not (running.metric("convoy_rejected_total", **REASON) or stream.done()):
                await asyncio.sleep(0.005)
        with suppress(aio.AioRpcError):
            while (answer := await stream.read()) is not aio.EOF:
                answers.append(answer)
        texts = {answer.error_message for answer in answers if answer.error_message}
        assert all("--max-inflight-bytes" in text for text in texts)
        if len(answers) < 20:
            codes = {grpc.StatusCode.RESOURCE_EXHAUSTED}
            code, details = await stream.code(), await stream.details()
            # The last is the client's own word for a write that failed before it had read why.
            assert code in codes or details == "Internal error from Core"
            assert frontends == "2"
        else:
            assert texts or stack == "native"  # whose streams wait for room
        await nothing_is_held(running)
        (one,) = [a async for a in running.stub.ModelStreamInfer(iter([request()]))]
        assert sums(one.infer_response) == [0]


@pytest.mark.parametrize("stack", ["native", "grpcio"])
async def test_a_small_budget_refuses_what_is_large_and_nothing_that_is_small(tmp_path: Path, stack: str) -> None:
    """However much of it there is: what the process and its allocator keep for themselves is not held against it."""
    wide_model(tmp_path)
    served = Served(tmp_path, "--max-inflight-bytes", str(2**23), "--frontends", "2", "--grpc-stack", stack)
    ended: Counter[tuple[int, grpc.StatusCode]] = Counter()
    try:
        async with aio.insecure_channel(served.url) as channel:
            stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)

            async def client(size: int) -> None:
                for _ in range(30):
                    ended[size, (await code_of(stub.ModelInfer(request(size))))[0]] += 1

            await asyncio.gather(*(client(size) for size in (4000, 1_000_000) * 12))
    finally:
        served.process.terminate()
        served.rest()
    assert ended.pop((4000, grpc.StatusCode.OK)) == 30 * 12
    assert ended.keys() == {(1_000_000, grpc.StatusCode.OK), (1_000_000, grpc.StatusCode.RESOURCE_EXHAUSTED)}


async def test_a_stream_that_is_cancelled_gives_everything_back(serving: Serving, tmp_path: Path) -> None:
    wide_model(tmp_path, seconds=0.3, output=50_000)
    async with serving(frontends="1") as running:
        stream = running.stub.ModelStreamInfer(iter([request()] * 20))
        await stream.read()
        assert running.app._budget.held
        stream.cancel()
        await nothing_is_held(running)


async def test_http_bodies_count_as_they_come_and_for_what_they_become(serving: Serving, tmp_path: Path) -> None:
    wide_model(tmp_path)
    async with serving(frontends="1", max_inflight_bytes=4 * SIZE) as running:
        port, budget = running.app.http_port, running.app._budget
        head = b"POST /v2/models/sum/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (3 * SIZE)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        await writer.drain()
        assert not budget.held
        writer.write(bytes(3 * SIZE - 1))
        while budget.held < 3 * SIZE - 1:
            await asyncio.sleep(0.005)
        raw = {"inference-header-content-length": "0"}
        answer = await call(port, "POST", "/v2/models/sum/infer", bytes(2 * SIZE), raw)  # and there is room for one
        assert (answer.status, "--max-inflight-bytes" in answer.json["error"]) == (503, True)
        writer.close()
        await nothing_is_held(running)
        packed = gzip.compress(bytes(10 * SIZE))
        inflated = await call(port, "POST", "/v2/models/sum/infer", packed, raw | {"content-encoding": "gzip"})
        assert inflated.status == 503
        await nothing_is_held(running)
        numbers = b"1," * SIZE + b"1"
        typed = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 5], "data": [' + numbers + b"]}]}"
        assert (await call(port, "POST", "/v2/models/sum/infer", typed)).status == 503
        await nothing_is_held(running)
        assert running.metric("convoy_rejected_total", **REASON) == 3


async def test_an_answer_counts_until_its_client_has_read_it(serving: Serving, tmp_path: Path) -> None:
    wide_model(tmp_path, output=10 * SIZE)
    async with serving(frontends="1") as running:
        budget = running.app._budget
        _, writer = await asyncio.open_connection("127.0.0.1", running.app.http_port, limit=1024)
        body = bytes(8)
        head = f"Host: a\r\nInference-Header-Content-Length: {len(document())}\r\nContent-Length: "
        sent = document() + body
        writer.write(f"POST /v2/models/sum/infer HTTP/1.1\r\n{head}{len(sent)}\r\n\r\n".encode() + sent)
        while budget.held < 40 * SIZE:
            await asyncio.sleep(0.005)
        writer.close()
        await nothing_is_held(running)


def document() -> bytes:
    """JSON that asks for everything as binary."""
    return (
        b'{"parameters": {"binary_data_output": true}, "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], '
        b'"parameters": {"binary_data_size": 8}}]}'
    )


async def test_images_count_for_the_pixels_that_they_have(serving: Serving, tmp_path: Path) -> None:
    folder = tmp_path / "photo" / "1"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text("{}")
    stated = json.dumps(json.dumps({"color": "RGB", "resize": 8, "size": [8, 8], "interpolation": "bilinear"}))
    (tmp_path / "photo" / "config.pbtxt").write_text(
        'backend: "fake"\nmax_batch_size: 4\n'
        'input { name: "x" data_type: TYPE_UINT8 format: FORMAT_NHWC dims: [8, 8, 3] }\n'
        'output { name: "y" data_type: TYPE_FP32 dims: [1] }\n'
        f'parameters {{ key: "preprocess" value {{ string_value: {stated} }} }}\n'
    )
    async with serving(frontends="1", max_inflight_bytes=2**22) as running:
        for side, status in ((700, 200), (800, 503)):  # 8 bytes a pixel
            file = io.BytesIO()
            Image.new("RGB", (side, side)).save(file, "PNG")
            headers = {"content-type": "image/png"}
            port = running.app.http_port
            assert (await call(port, "POST", "/v2/models/photo/infer", file.getvalue(), headers)).status == status
            await nothing_is_held(running)
