"""TensorRT engines for tests, built with whatever TensorRT is installed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from convoynet.exporter.engine_options import BuildOptions, Profile
from convoynet.exporter.progress import Quiet
from convoynet.exporter.tensorrt.build import build
from convoynet.exporter.tensorrt.library import find

needs_tensorrt = pytest.mark.skipif(find() is None, reason="needs tensorrt or tensorrt_rtx: pip install tensorrt-rtx")


def plan(model: bytes | Path, batch: tuple[int, int, int]) -> bytes:
    """The engine of `model` for the smallest, most usual and largest `batch`."""
    return build(model, BuildOptions((Profile(*batch),)), Quiet()).content


def model_of(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, NDArray[np.generic]],
    data_type: int = onnx.TensorProto.FLOAT,
    shape: Sequence[str | int] = ("batch", 4),
) -> bytes:
    """x -> `nodes` -> y, both of `shape`."""
    graph = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("x", data_type, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def pair(zero_point: NDArray[np.generic] | None, **attributes: int) -> bytes:
    """x -> pair.q -> pair.dq -> y, with this zero point or none."""
    names = ["scale"] if zero_point is None else ["scale", "zero"]
    constants: dict[str, NDArray[np.generic]] = {"scale": np.array(0.1, np.float32)}
    if zero_point is not None:
        constants["zero"] = zero_point
    quantized = helper.make_node("QuantizeLinear", ["x", *names], ["q"], name="pair.q", **attributes)
    return model_of([quantized, helper.make_node("DequantizeLinear", ["q", *names], ["y"], name="pair.dq")], constants)
