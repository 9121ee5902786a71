"""A request whose client is gone holds nothing more: neither its bytes, nor their place on the shelf of a front end.

The garbage collector comes rarely in a server, and knows nothing of what a reference cycle holds beside itself.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.frontend.channel import _Lent
from convoynet.server.types import InferRequest
from tests.server.conftest import Running, Serving, code_of, fake_model

NUMBERS = 50_000


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left() -> int:
    """Requests, and views of a shelf, that are still there."""
    return sum(isinstance(each, InferRequest | _Lent) for each in gc.get_objects())


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


NATIVE = [{"grpc_stack": "native"}] if find_spec("pygrpc_native") else []


@pytest.mark.parametrize("settings", [{"frontends": "1"}, {"frontends": "2"}, *NATIVE])
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
            for _ in range(100):  # an engine may have had it already
                if left() <= before:
                    break
                await asyncio.sleep(0.05)
            assert left() <= before, leaves.__name__
