from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.float16 import float32_nodes, to_bf16, to_fp16
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.running import openvino
from tests.exporter.engines import needs_tensorrt, plan
from tests.exporter.onnx_runs import operators, run, run_basic, signal_to_noise_db
from tests.exporter.quantization.test_quantize import Proposals
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

FP16, BF16, FLOAT = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT
NORMALISATION = ["Transpose channels_first", "Mul scaled", "Add normalized"]


@pytest.fixture(scope="module")
def exact() -> onnx.ModelProto:
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True, opset=22)


@pytest.fixture(scope="module")
def ranges(exact: onnx.ModelProto) -> dict[str, Range]:
    return calibrate(exact, [pixels(16)], "minmax")


def model_of(nodes: list[onnx.NodeProto], constants: dict[str, NDArray[np.generic]], side: int = 8) -> onnx.ModelProto:
    """x [batch, 4, side, side] -> `nodes` -> y."""
    graph = helper.make_graph(
        nodes,
        "typed",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", 4, side, side])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def kernel(value: float) -> NDArray[np.float32]:
    return np.full((4, 4, 1, 1), value, np.float32)


def types_of(model: onnx.ModelProto) -> Counter[int]:
    return Counter(tensor.data_type for tensor in model.graph.initializer)


def test_fp16_computes_in_half_precision_between_two_casts(exact: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    before = exact.SerializeToString(deterministic=True)
    typed = to_fp16(exact, ranges)
    assert exact.SerializeToString(deterministic=True) == before
    assert typed.SerializeToString(deterministic=True) == to_fp16(exact, ranges).SerializeToString(deterministic=True)
    assert list(typed.graph.input) == list(exact.graph.input)
    assert list(typed.graph.output) == list(exact.graph.output)
    assert float32_nodes(typed) == NORMALISATION
    assert operators(typed)["Cast"] == operators(exact)["Cast"] + 2
    assert types_of(typed)[FLOAT] == 2  # mean and deviation of the pixels
    assert typed.ByteSize() < 0.6 * exact.ByteSize()
    assert signal_to_noise_db(run(exact, pixels(16)), run(typed, pixels(16))) > 55


def test_fp16_with_int8_has_no_cast_between_weights_and_layers(
    exact: onnx.ModelProto, ranges: dict[str, Range]
) -> None:
    int8 = quantize(exact, ranges, "gpu")
    typed = to_fp16(int8, ranges)
    graph = Graph(typed)
    for node in graph:
        if node.op_type in {"Conv", "Gemm"}:
            assert [graph.producer_type(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2
        if node.op_type == "DequantizeLinear":
            assert graph.initializers[node.input[1]].data_type == FP16
    assert operators(typed)["Cast"] <= operators(exact)["Cast"] + 1  # pixels are quantized in float32: the result alone
    reference = run(exact, pixels(16))
    before, after = (signal_to_noise_db(reference, run_basic(model, pixels(16))) for model in (int8, typed))
    assert after > before - 1


def test_bf16_in_other_runtimes(exact: onnx.ModelProto) -> None:
    """ONNX Runtime has no bfloat16 on a CPU: see the lint rule."""
    typed = to_bf16(exact)
    assert float32_nodes(typed) == NORMALISATION
    assert types_of(typed)[BF16] > 15
    reference = run(exact, pixels(2))
    (found,) = ReferenceEvaluator(typed).run(None, {"input": pixels(2)})
    assert signal_to_noise_db(reference, found) > 30
    if not openvino.installed():
        pytest.skip("needs openvino: pip install openvino")
    normalized = onnx_from_torch(small_net(), PREPROCESS, uint8_input=False, opset=22)
    runner = openvino.OpenVino(to_bf16(normalized).SerializeToString(), PREPROCESS, task="classification", threads=1)
    (logits,) = runner(runner.prepare(pixels(2)))
    assert signal_to_noise_db(reference, logits) > 30


@needs_tensorrt
@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8 + fp16", "int8 + bf16", "fp8 + fp16"])
def test_tensorrt_builds_it(exact: onnx.ModelProto, ranges: dict[str, Range], kind: str) -> None:
    number, _, half = kind.rpartition(" + ")
    graph = quantize(exact, ranges, "gpu", (), number) if number else exact
    typed = to_fp16(graph, ranges) if half == "fp16" else to_bf16(graph)
    assert len(plan(typed.SerializeToString(), (1, 2, 8))) > 10_000


def test_constants_beyond_fp16_keep_their_layer_in_float32() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "small"], ["a"]),
        helper.make_node("Conv", ["a", "large"], ["b"]),
        helper.make_node("Conv", ["b", "small"], ["y"]),
    ]
    model = model_of(nodes, {"small": kernel(1e-3), "large": kernel(1e5)})
    assert float32_nodes(to_fp16(model)) == ["Conv b"]
    assert not float32_nodes(to_bf16(model))
    inputs = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    assert signal_to_noise_db(run(model, inputs), run(to_fp16(model), inputs)) > 50


def test_activations_beyond_fp16_stay_float32_with_what_makes_and_reads_them() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w"], ["c"]),
        helper.make_node("Conv", ["c", "w"], ["y"]),
    ]
    model = model_of(nodes, {"w": kernel(0.1)})
    ranges = {"b": Range(0.0, 20_000.0), "c": Range(-100.0, 100.0)}
    # a is the operand of a ReLU, and so at least as large as b.
    assert float32_nodes(to_fp16(model, ranges)) == ["Conv a", "Relu b", "Conv c"]
    assert not float32_nodes(to_fp16(model))
    inputs = np.full((2, 4, 8, 8), 5e5, np.float32)
    typed = to_fp16(model, {"x": Range(0, 5e5), **ranges})
    np.testing.assert_allclose(run(typed, inputs), run(model, inputs), rtol=1e-2)


def test_means_over_large_areas_and_powers_stay_float32() -> None:
    def pooled(side: int) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["a"]),
            helper.make_node("GlobalAveragePool", ["a"], ["b"]),
            helper.make_node("LRN", ["b"], ["c"], size=3),
            helper.make_node("Sigmoid", ["c"], ["y"]),
        ]
        return model_of(nodes, {"w": kernel(0.1)}, side)

    assert float32_nodes(to_fp16(pooled(8))) == ["LRN c"]
    assert float32_nodes(to_fp16(pooled(64))) == ["GlobalAveragePool b", "LRN c"]
    assert float32_nodes(to_fp16(pooled(64), {"a": Range(-1.0, 2.0)})) == ["LRN c"]
    assert not float32_nodes(to_bf16(pooled(64)))


def test_scales_that_fp16_does_not_have_are_raised() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 16, 3)
    with torch.no_grad():
        for channel, factor in enumerate((1e-9, 1e-5, 1e-4, 1e-3)):
            conv.weight[channel] *= factor
    exact = onnx_from_torch(nn.Sequential(conv, nn.Flatten()).eval(), PREPROCESS, uint8_input=True)
    ranges = calibrate(exact, [pixels(8)], "minmax")
    int8 = quantize(exact, ranges, "gpu")
    typed = to_fp16(int8, ranges)
    assert not [name for name in float32_nodes(typed) if name.startswith("Dequantize")]
    (scale,) = (t for t in typed.graph.initializer if len(t.dims) == 1 and "weight.scale" in t.name)
    assert scale.data_type == FP16
    assert numpy_helper.to_array(scale).min() >= 2.0**-24
    reference = run(exact, pixels(8)).reshape(8, 16, -1)
    largest = np.abs(reference).max(axis=(0, 2))
    for model in (int8, typed):
        moved = np.abs(run_basic(model, pixels(8)).reshape(8, 16, -1) - reference).max(axis=(0, 2))
        assert (moved < 0.03 * largest).all()


def test_what_is_behind_the_heads_of_a_detector_stays_float32() -> None:
    torch.manual_seed(0)
    exact = onnx_from_torch(Proposals().eval(), PREPROCESS, uint8_input=False, task="detection")
    kept = Counter(item.split()[0] for item in float32_nodes(to_fp16(exact)))
    assert kept["TopK"] == 1
    assert kept["Softmax"] == 1
    assert kept["GatherElements"] == 2
    assert not kept["Conv"] + kept["Relu"]


def test_a_body_of_control_flow_reads_float32() -> None:
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(operator, ["a"], [name])], name, [], [helper.make_tensor_value_info(name, FLOAT, None)]
        )
        for name, operator in (("then", "Relu"), ("else", "Neg"))
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("If", ["yes"], ["b"], **branches),
        helper.make_node("Conv", ["b", "w"], ["y"]),
    ]
    model = model_of(nodes, {"w": kernel(0.1), "yes": np.array(True)})
    inputs = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    assert float32_nodes(to_fp16(model)) == ["If b"]
    assert signal_to_noise_db(run(model, inputs), run(to_fp16(model), inputs)) > 50


def test_what_cannot_be_typed_says_why(exact: onnx.ModelProto) -> None:
    with pytest.raises(BadInput, match=r"in half precision already"):
        to_fp16(to_fp16(exact))
    old = onnx_from_torch(small_net(), PREPROCESS, uint8_input=False)
    with pytest.raises(BadInput, match=r"opset 20 lacks operators in bf16: export with --opset 22"):
        to_bf16(old)
