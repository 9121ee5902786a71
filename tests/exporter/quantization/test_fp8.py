import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.quantize import fp8_scale, fp8_weights, layers, quantize, weight_scales
from tests.exporter.engines import needs_tensorrt, plan
from tests.exporter.onnx_runs import run, run_basic, signal_to_noise_db
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

FP8 = TensorProto.FLOAT8E4M3FN


@pytest.fixture(scope="module")
def exact() -> onnx.ModelProto:
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True)


@pytest.fixture(scope="module")
def ranges(exact: onnx.ModelProto) -> dict[str, Range]:
    return calibrate(exact, [pixels(32)], "minmax")


def test_fp8_stays_close_and_has_fp8_types_alone(exact: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    quantized = quantize(exact, ranges, "gpu", (), "fp8")
    onnx.checker.check_model(quantized, full_check=True)
    graph = Graph(quantized)
    pairs = [node for node in graph if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert {graph.initializers[node.input[2]].data_type for node in pairs} == {FP8}
    # None with 16 channels or fewer on a side, nor the depthwise one; pools, Adds and Concats read no pair.
    weights = [Graph(exact).producers[name].input[1] for name in layers(exact, "gpu", "fp8")]
    assert weights == ["again.0.weight", "right.0.weight", "mix.0.weight", "head.weight"]
    readers = {r.op_type for n in pairs if n.op_type[0] == "D" for r in graph.readers(n.output[0])}
    assert readers == {"Conv", "Gemm"}
    assert signal_to_noise_db(run(exact, pixels(32)), run_basic(quantized, pixels(32))) > 22


def test_kernels_that_are_too_large_stay_float() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 7), nn.Conv2d(32, 32, 5)]
    net = nn.Sequential(*convs, nn.Flatten(), nn.Linear(32 * 22 * 22, 16)).eval()
    graph = Graph(onnx_from_torch(net, PREPROCESS, uint8_input=False))
    assert [graph.producers[name].input[1] for name in layers(graph.model, "gpu", "fp8")] == ["2.weight", "4.weight"]


def test_fp8_is_for_gpus(exact: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    with pytest.raises(BadInput, match="'fp8' for target cpu: use int8"):
        quantize(exact, ranges, "cpu", (), "fp8")


@given(
    npst.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.floats(-1e3, 1e3, width=32))
)
def test_fp8_weights_are_off_by_a_sixteenth_or_by_half_the_smallest_step(values: NDArray[np.float32]) -> None:
    scales = weight_scales(values) * np.float32(127 / 448)
    restored = fp8_weights(values, scales).astype(np.float64) * scales[:, None].astype(np.float64)
    allowed = np.maximum(np.abs(values) / 16, scales[:, None] * 2.0**-10)
    assert (np.abs(restored - values) <= allowed * (1 + 1e-4)).all()


def test_the_largest_value_of_a_range_is_the_largest_of_fp8() -> None:
    assert float(fp8_scale(Range(-8.96, 1.0)).scale) == pytest.approx(0.02)
    assert float(fp8_scale(Range(0.0, 0.0)).scale) == 1


@needs_tensorrt
def test_tensorrt_builds_it(exact: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    quantized = quantize(exact, ranges, "gpu", (), "fp8")
    assert len(plan(quantized.SerializeToString(), (1, 2, 8))) > 10_000
