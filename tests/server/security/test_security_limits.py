"""Sizes that a client names are checked before anything is allocated, and every limit is explicit."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import struct
from pathlib import Path

import grpc
import pytest
from PIL import Image

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import Oversize, QueueFull
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.spec import BatchPolicy
from convoynet.server.types import Timings
from tests.server import onnx_models
from tests.server.conftest import Serving, code_of, fake_model, infer_request
from tests.server.http_calls import call

INVALID = grpc.StatusCode.INVALID_ARGUMENT
INFER = "/v2/models/sum/infer"


# Every size is checked in 64 bits before anything is allocated.


def _shaped(*shape: int, raw: bytes = b"", datatype: str = "FP32") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="sum", raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    return request


SIZES = {
    "a product that is 0 in 64 bits": _shaped(2**32, 2**32),
    "a product that is small in 32 bits": _shaped(2**30, 4, raw=b"\0" * 16),
    "a product beyond 64 bits": _shaped(*[2**62] * 40),
    "a huge dimension beside a 0": _shaped(0, 2**62),
    "dimensions without end": _shaped(*[1] * 100_000),
    "negative": _shaped(-(2**63), 4),
    "more rows than bytes": _shaped(2**40, 4, raw=b"\0" * 16),
    "a batch beyond the largest": _shaped(9, 4, raw=b"\0" * 144),
    "more texts than bytes": _shaped(2**40, datatype="BYTES", raw=b"\0" * 16),
    "a text longer than all": _shaped(1, datatype="BYTES", raw=struct.pack("<I", 2**32 - 1) + b"x"),
}


async def test_sizes_are_checked_in_64_bits_before_allocation(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        for case, message in SIZES.items():
            code, text = await code_of(running.stub.ModelInfer(message, timeout=60))
            assert (code, len(text) <= 2000) == (INVALID, True), (case, text)
            only, raw = message.inputs[0], message.raw_input_contents[0]
            parameters = {"binary_data_size": len(raw)}
            entry = {"name": "x", "datatype": only.datatype, "shape": list(only.shape), "parameters": parameters}
            head = json.dumps({"inputs": [entry]}).encode()
            headers = {"Inference-Header-Content-Length": str(len(head))}
            assert (await call(running.app.http_port, "POST", INFER, head + raw, headers)).status == 400, case


async def test_the_number_of_classes_is_bounded_by_the_output(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    request = infer_request(1)
    request.outputs.add(name="y").parameters["classification"].int64_param = 2**62
    async with serving() as running:
        response = await running.stub.ModelInfer(request)
        assert list(response.outputs[0].shape) == [1, 1]


# Limits are explicit: message, pixels, decompressed bytes, streams, queue bytes.


async def test_messages_are_bounded(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving(max_message_bytes=100_000) as running:
        code, _ = await code_of(running.stub.ModelInfer(_shaped(1, raw=b"\0" * 100_000)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await call(running.app.http_port, "POST", INFER, b" " * 100_001)).status == 413


async def test_decompressed_bytes_are_bounded(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving(max_message_bytes=100_000) as running:
        bomb = _shaped(1, raw=b"\0" * 50_000_000)
        code, _ = await code_of(running.stub.ModelInfer(bomb, compression=grpc.Compression.Gzip))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        headers = {"Content-Encoding": "gzip"}
        answer = await call(running.app.http_port, "POST", INFER, gzip.compress(b"\0" * 50_000_000), headers)
        assert answer.status == 413


async def test_decoded_pixels_are_bounded(serving: Serving, tmp_path: Path) -> None:
    onnx_models.write_colors(tmp_path)
    image = io.BytesIO()
    Image.new("RGB", (400, 400)).save(image, "PNG")
    async with serving(max_image_pixels=100_000) as running:
        headers = {"Content-Type": "image/png"}
        answer = await call(running.app.http_port, "POST", "/v2/models/colors/infer", image.getvalue(), headers)
        assert (answer.status, "pixels" in answer.json["error"]) == (400, True)


async def test_streams_are_bounded(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, config="max_batch_size: 1\ndynamic_batching { }\n")
    async with serving(max_streams=2) as running:
        model = next(iter(running.app.core))
        # Until the client has the server's settings it holds itself to nothing.
        await running.stub.ModelInfer(infer_request(0))
        most = 0
        with running.held():
            calls = [asyncio.ensure_future(running.stub.ModelInfer(infer_request(i))) for i in range(6)]
            await running.until(lambda model: model.inflight == 2)
            await asyncio.sleep(0.1)  # a third would come at once
            most = model.inflight
        while not all(c.done() for c in calls):
            most = max(most, model.inflight)
            await asyncio.sleep(0.01)
        assert most == 2


async def test_metadata_is_bounded(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        big = (("x", "a" * 200_000),)
        code, _ = await code_of(running.stub.ModelInfer(infer_request(1), metadata=big))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        answer = await call(running.app.http_port, "GET", "/v2", headers={"x": "a" * 10_000})
        assert answer.status == 200


async def test_queue_bytes_are_bounded() -> None:
    def waiting(nbytes: int) -> Entry:
        return Entry(1, nbytes, asyncio.get_running_loop().create_future(), Timings())

    scheduler = Scheduler(BatchPolicy(8, 0.0, 100, max_queue_bytes=1000))
    scheduler.admit(waiting(600))
    with pytest.raises(QueueFull):
        scheduler.admit(waiting(401))
    with pytest.raises(Oversize, match="at most 1000 may wait"):
        scheduler.admit(waiting(1001))
    scheduler.admit(waiting(400))
