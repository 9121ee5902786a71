"""The exporter's sessions of ONNX Runtime."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.archs.onnx_network import session_of
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.graph.onnx_session import make_session, session_options
from convoynet.exporter.running.runtime import Session, inner_session

SIDE = 8


def model_of(nodes: list[onnx.NodeProto], kind: int, weights: NDArray[np.int8], step: float) -> onnx.ModelProto:
    """Pixels [n, 1, 8, 8] of one type -> logits [n, channels, 1, 1] of it, by constants that the nodes name."""
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("input", kind, ["batch", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", kind, ["batch", len(weights), 1, 1])],
        [
            helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
            helper.make_tensor("step", TensorProto.FLOAT, [], [step]),
            helper.make_tensor("zero", TensorProto.UINT8, [], [0]),
            helper.make_tensor("none", TensorProto.INT8, [], [0]),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def large_sums() -> onnx.ModelProto:
    """A convolution's sums of products of the largest 8-bit numbers, in floats between integers."""
    weights = np.zeros((3, 1, SIDE, SIDE), np.int8)
    weights[:] = np.array([127, 100, -127])[:, None, None, None]
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "one", "zero"], ["bytes"]),
        helper.make_node("DequantizeLinear", ["bytes", "one", "zero"], ["pixels"]),
        helper.make_node("DequantizeLinear", ["weights", "one", "none"], ["kernels"]),
        helper.make_node("Conv", ["pixels", "kernels"], ["sums"]),
        helper.make_node("QuantizeLinear", ["sums", "step", "none"], ["steps"]),
        helper.make_node("DequantizeLinear", ["steps", "step", "none"], ["logits"]),
    ]
    return model_of(nodes, TensorProto.FLOAT, weights, SIDE * SIDE * 255.0)


def test_sums_of_8_bit_products_do_not_overflow_on_any_processor() -> None:
    """Without VNNI, pairs of them are added in 16 bits where nobody asks for more."""
    model = large_sums()
    inputs = np.full((2, 1, SIDE, SIDE), 255, np.float32)
    want = np.array([[127, 100, -127]] * 2).reshape(2, 3, 1, 1) * SIDE * SIDE * 255
    preprocess = Preprocess((SIDE, SIDE), SIDE, (0.0,), (1.0,))
    for optimized in (True, False):
        run = Session(
            model.SerializeToString(), preprocess, task="classification", target="cpu", threads=1, optimized=optimized
        )
        np.testing.assert_array_equal(run(inputs)[0], want)
        (found,) = inner_session(model, ["logits"], optimized=optimized).run(None, {"input": inputs})
        np.testing.assert_array_equal(found, want)
    (found,) = session_of(model, optimized=True).run(None, {"input": inputs})
    np.testing.assert_array_equal(found, want)


def test_a_convolution_of_signed_numbers_alone_is_taken_on_any_processor() -> None:
    """As a given ONNX file may have it; without VNNI ONNX Runtime has no kernel that adds its products in 32 bits."""
    names = ["input", "one", "none", "weights", "one", "none", "step", "none"]
    nodes = [helper.make_node("QLinearConv", names, ["logits"])]
    weights = np.full((1, 1, SIDE, SIDE), 127, np.int8)
    model = model_of(nodes, TensorProto.INT8, weights, SIDE * SIDE * 127.0)
    inputs = np.full((2, 1, SIDE, SIDE), -127, np.int8)
    (found,) = make_session(model.SerializeToString(), session_options()).run(None, {"input": inputs})
    np.testing.assert_array_equal(found.ravel(), [-127, -127])
