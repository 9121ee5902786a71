"""What is over holds nothing more: no bytes of a request or an answer, and no place on the shelf of a front end.

The garbage collector comes rarely in a server, and knows nothing of what a reference cycle holds beside itself.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.frontend.channel import _Lent
from convoynet.server.protocol.dispatch import Reply
from convoynet.server.types import InferRequest, InferResult
from tests.server.conftest import Running, Serving, code_of, fake_model, infer_request
from tests.server.protocol.test_counting import wide_model

NUMBERS = 50_000


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    gc.freeze()  # what was there before is not looked through again and again
    yield
    gc.unfreeze()
    gc.enable()


def left() -> int:
    """Requests, answers, and views of a shelf that are still there."""
    # By the type itself: some objects of libraries warn when they are asked for their class.
    found = [each for each in gc.get_objects() if type(each) in (InferRequest, InferResult, Reply, _Lent)]
    return sum(not isinstance(each, Reply) or bool(each.payload) for each in found)


async def let_go(before: int) -> bool:
    for _ in range(600):  # a minute at least
        if left() <= before:
            return True
        await asyncio.sleep(0.1)
    return False


def request() -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="sum")
    message.inputs.add(name="x", datatype="FP32", shape=[1, NUMBERS])
    message.raw_input_contents.append(np.ones(NUMBERS, np.float32).tobytes())
    return message


async def hangs_up(running: Running) -> None:
    size = 4 * NUMBERS
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, NUMBERS], "parameters": {"binary_data_size": size}}
    document = json.dumps({"inputs": [tensor]}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", running.app.http_port)
    writer.write(
        b"POST /v2/models/sum/infer HTTP/1.1\r\nHost: a\r\nInference-Header-Content-Length: %d\r\n" % len(document)
        + b"Content-Length: %d\r\n\r\n" % (len(document) + size) + document + bytes(size)
    )  # fmt: skip
    await running.until(lambda model: model.inflight == 1)
    writer.transport.abort()


async def cancels(running: Running) -> None:
    call = running.stub.ModelInfer(request())
    await running.until(lambda model: model.inflight == 1)
    call.cancel()


async def cancels_a_stream(running: Running) -> None:
    async def requests() -> Any:
        yield request()
        await asyncio.Event().wait()

    call = running.stub.ModelStreamInfer(requests())
    await running.until(lambda model: model.inflight == 1)
    call.cancel()


async def runs_out_of_time(running: Running) -> None:
    timed = request()
    timed.parameters["timeout"].int64_param = 1000
    await code_of(running.stub.ModelInfer(timed))


SETTINGS = pytest.mark.parametrize(
    "settings", [{"grpc_stack": stack, "frontends": count} for stack in ("native", "grpcio") for count in ("1", "2")]
)


@SETTINGS
@pytest.mark.usefixtures("no_collector")
async def test_who_goes_leaves_nothing_of_a_request(serving: Serving, tmp_path: Path, settings: dict[str, str]) -> None:
    fake_model(tmp_path)
    config = tmp_path / "sum" / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [4]", "dims: [-1]"))
    async with serving(**settings) as running:
        before = left()
        for leaves in (cancels, hangs_up, cancels_a_stream, runs_out_of_time, cancels, cancels):
            with running.held():
                await leaves(running)
                await running.until(lambda model: not model.inflight)
            assert await let_go(before), leaves.__name__  # an engine may have had it already


@SETTINGS
@pytest.mark.usefixtures("no_collector")
async def test_an_answer_that_is_refused_is_let_go(serving: Serving, tmp_path: Path, settings: dict[str, str]) -> None:
    """For its size, and for want of room."""
    wide_model(tmp_path, 150_000)
    room = 2**20 * int(settings.get("frontends", "1"))
    async with serving(**settings, max_inflight_bytes=room, max_message_bytes=1_500_000) as running:
        before = left()
        for rows, text in ((3, "the answer has"), (2, "the server has no room")):
            code, why = await code_of(running.stub.ModelInfer(infer_request(*range(rows), model="wide")))
            assert (code, why[: len(text)]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            assert await let_go(before), text
