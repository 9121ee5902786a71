"""Rows of one client never reach another, whatever a model makes of a batch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.types import Tensor
from tests.server.conftest import Serving
from tests.server.engine_setup import installed
from tests.server.onnx_graphs import FLOAT, node, write_graph

pytestmark = pytest.mark.skipif(not installed("onnxruntime"), reason="the engine is an extra")

CONFIG = (
    'backend: "onnxruntime" max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 300000 }\n'
    'input { name: "x" data_type: TYPE_FP32 dims: [2] } output { name: "y" data_type: TYPE_FP32 dims: [2] }\n'
    'parameters { key: "engine" value { string_value: "onnxruntime" } }'
)
BATCHED = [("x", FLOAT, ["B", 2])], [("y", FLOAT, [None, 2])]


def request(*rows: tuple[float, float]) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="graph")
    message.inputs.add(name="x", datatype="FP32", shape=[len(rows), 2])
    message.raw_input_contents.append(np.array(rows, np.float32).tobytes())
    return message


def answer(response: pb.ModelInferResponse) -> list[list[float]]:
    values: Tensor = np.frombuffer(response.raw_output_contents[0], np.float32)
    return values.reshape(response.outputs[0].shape).tolist()


async def test_a_batch_whose_rows_do_not_match_is_run_again_one_request_at_a_time(
    serving: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows are dropped for one number alone, which no trial guesses."""
    nodes = [node("ReduceMax", "x one", "most", keepdims=0), node("Equal", "most limit", "gone")]
    nodes += [node("Not", "gone", "keep"), node("Compress", "x keep", "y", axis=0)]
    constants = {"one": np.int64([1]), "limit": np.float32(12345)}
    write_graph(tmp_path, nodes, *BATCHED, constants, config=CONFIG)
    gone = (12345.0, 0.0)
    async with serving() as running:
        model = running.app.core.model("graph")
        assert "batching" not in model.info
        asked = [[(1.0, 2.0)], [(3.0, 4.0), gone, (5.0, 6.0)], [gone], [(7.0, 8.0)]]
        for _ in range(2):  # the second time it is known
            answers = await asyncio.gather(*(running.stub.ModelInfer(request(*rows)) for rows in asked))
            assert [answer(a) for a in answers] == [[list(row) for row in rows if row != gone] for rows in asked]
        assert running.metric("convoy_inferences_total", model="graph", version="1") == 12
    assert "its requests are run alone from now on" in caplog.text


async def test_a_model_that_mixes_rows_gets_one_request_at_a_time(serving: Serving, tmp_path: Path) -> None:
    nodes = [node("ReduceMean", "x zero", "mean"), node("Sub", "x mean", "y")]
    write_graph(tmp_path, nodes, *BATCHED, {"zero": np.int64([0])}, config=CONFIG)
    async with serving() as running:
        assert "a row is answered otherwise alone" in running.app.core.model("graph").info["batching"]
        asked = [[(float(i), 1.0), (i + 2.0, 1.0)] for i in range(6)]
        answers = await asyncio.gather(*(running.stub.ModelInfer(request(*rows)) for rows in asked))
        assert [answer(a) for a in answers] == [[[-1, 0], [1, 0]]] * 6
        config = await running.stub.ModelConfig(pb.ModelConfigRequest(name="graph"))
        assert "requests are run alone" in config.config.parameters["batching"].string_value


async def test_a_model_whose_rows_are_objects_answers_with_all_of_them(serving: Serving, tmp_path: Path) -> None:
    nodes = [node("ReduceSum", "x one", "sum", keepdims=0), node("Greater", "sum zero", "keep")]
    nodes += [node("Compress", "x keep", "y", axis=0)]
    write_graph(tmp_path, nodes, *BATCHED, {"one": np.int64([1]), "zero": np.float32(0)}, config=CONFIG)
    async with serving() as running:
        asked = [[(1.0, 2.0)], [(-1.0, -2.0)], [(3.0, 3.0), (-4.0, 0.0)]]
        answers = await asyncio.gather(*(running.stub.ModelInfer(request(*rows)) for rows in asked))
        assert [answer(a) for a in answers] == [[[1, 2]], [], [[3, 3]]]
        assert [list(a.outputs[0].shape) for a in answers] == [[1, 2], [0, 2], [1, 2]]
