from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from exporter import trt_from_onnx as trt
from exporter.calibrate import calibrate
from exporter.errors import BadInput, Missing
from exporter.histogram import Range
from exporter.onnx_from_torch import onnx_from_torch
from exporter.quantize import quantize
from exporter.trt_from_onnx import builder_name, trt_from_onnx
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

BATCH = (1, 2, 8)

pytestmark = pytest.mark.skipif(
    builder_name() is None, reason="needs tensorrt or tensorrt_rtx: pip install tensorrt-rtx"
)


@pytest.fixture(scope="module")
def float_graph() -> onnx.ModelProto:
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True)


@pytest.fixture(scope="module")
def ranges(float_graph: onnx.ModelProto) -> dict[str, Range]:
    return calibrate(float_graph, [pixels(16)], "minmax")


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
    names = ["scale"] if zero_point is None else ["scale", "zero"]
    constants: dict[str, NDArray[np.generic]] = {"scale": np.array(0.1, np.float32)}
    if zero_point is not None:
        constants["zero"] = zero_point
    quantized = helper.make_node("QuantizeLinear", ["x", *names], ["q"], name="pair.q", **attributes)
    return model_of([quantized, helper.make_node("DequantizeLinear", ["q", *names], ["y"], name="pair.dq")], constants)


def test_the_builder_has_a_name_and_a_version() -> None:
    name = builder_name()
    assert name is not None
    library, version = name.split()
    assert library in {"tensorrt", "tensorrt_rtx"}
    assert version[0].isdigit()


def test_float_and_int8_engines_build_from_pixels(
    float_graph: onnx.ModelProto, ranges: dict[str, Range], tmp_path: Path
) -> None:
    int8 = quantize(float_graph, ranges, "gpu")
    assert len(trt_from_onnx(int8.SerializeToString(), BATCH)) > 10_000
    file = tmp_path / "model.onnx"
    file.write_bytes(float_graph.SerializeToString())
    assert len(trt_from_onnx(file, BATCH)) > 10_000


def test_weights_beside_the_file_are_found(float_graph: onnx.ModelProto, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    model = onnx.ModelProto()
    model.CopyFrom(float_graph)
    onnx.save(model, str(file), save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size > 10_000
    assert len(trt_from_onnx(file, BATCH)) > 10_000


def test_the_cpu_graph_is_refused(float_graph: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    with pytest.raises(BadInput, match=r"UINT8.*--target gpu"):
        trt_from_onnx(quantize(float_graph, ranges, "cpu").SerializeToString(), BATCH)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (pair(np.array(0, np.uint8)), "QuantizeLinear 'pair.q' uses UINT8"),  # parses, and clips 128..255 to 127
        (pair(np.array(128, np.uint8)), "uses UINT8"),
        (pair(None), "uses UINT8"),  # what ONNX takes for a missing zero point
        (pair(np.array(3, np.int8)), "zero point that is not 0"),
        (pair(np.array(0, np.int16)), "uses INT16"),
    ],
)
def test_quantization_that_tensorrt_would_misread_is_refused(model: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        trt_from_onnx(model, BATCH)


@pytest.mark.parametrize("model", [pair(np.array(0, np.int8)), pair(None, output_dtype=onnx.TensorProto.INT8)])
def test_symmetric_int8_is_accepted_with_and_without_a_zero_point(model: bytes) -> None:
    assert trt_from_onnx(model, BATCH)


def test_a_raw_uint8_input_may_be_cast_but_not_dequantized() -> None:
    scale = {"scale": np.array(0.1, np.float32)}
    dequantize = helper.make_node("DequantizeLinear", ["x", "scale"], ["y"])
    with pytest.raises(BadInput, match="DequantizeLinear 'y' uses UINT8"):
        trt_from_onnx(model_of([dequantize], scale, onnx.TensorProto.UINT8), BATCH)
    cast = helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.FLOAT)
    assert trt_from_onnx(model_of([cast], {}, onnx.TensorProto.UINT8), BATCH)


def test_uint8_that_passes_other_nodes_is_found() -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("DequantizeLinear", ["flat", "scale"], ["y"]),
    ]
    with pytest.raises(BadInput, match="uses UINT8"):
        trt_from_onnx(model_of(nodes, {"scale": np.array(0.1, np.float32)}, onnx.TensorProto.UINT8), BATCH)


def test_an_int32_bias_is_refused() -> None:
    constants: dict[str, NDArray[np.generic]] = {"b": np.ones(4, np.int32), "scale": np.array(0.1, np.float32)}
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "scale"], ["bias"]),
        helper.make_node("Add", ["x", "bias"], ["y"]),
    ]
    with pytest.raises(BadInput, match="uses INT32"):
        trt_from_onnx(model_of(nodes, constants), BATCH)


def test_uint8_inside_a_branch_is_refused() -> None:
    constants = {"scale": numpy_helper.from_array(np.array(0.1, np.float32), "scale")}
    branches = {}
    for name in ("then", "else"):
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale"], [f"{name}.q"]),
            helper.make_node("DequantizeLinear", [f"{name}.q", "scale"], [f"{name}.y"]),
        ]
        result = helper.make_tensor_value_info(f"{name}.y", onnx.TensorProto.FLOAT, None)
        branches[f"{name}_branch"] = helper.make_graph(nodes, name, [], [result], list(constants.values()))
    choice = helper.make_node("If", ["yes"], ["y"], **branches)
    with pytest.raises(BadInput, match=r"'then.q' uses UINT8|'else.q' uses UINT8"):
        trt_from_onnx(model_of([choice], {"yes": np.array(True)}), BATCH)


def test_a_zero_point_that_is_computed_is_refused() -> None:
    nodes = [
        helper.make_node("Identity", ["zero"], ["computed"]),
        helper.make_node("QuantizeLinear", ["x", "scale", "computed"], ["q"], name="pair.q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "computed"], ["y"]),
    ]
    constants: dict[str, NDArray[np.generic]] = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.int8)}
    with pytest.raises(BadInput, match=r"'pair\.q' has a zero point that is computed"):
        trt_from_onnx(model_of(nodes, constants), BATCH)


def test_the_parsers_words_and_the_node_are_in_one_line() -> None:
    unknown = helper.make_node("NonZero", ["x"], ["indices"], name="where")
    cast = helper.make_node("Cast", ["indices"], ["y"], to=onnx.TensorProto.FLOAT)
    with pytest.raises(BadInput, match=r"TensorRT cannot read this graph: NonZero 'where'") as error:
        trt_from_onnx(model_of([unknown, cast], {}), BATCH)
    assert "\n" not in str(error.value)


def test_a_static_batch_must_be_the_one_asked_for() -> None:
    relu = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, shape=(4, 4))
    assert trt_from_onnx(relu, (4, 4, 4))
    with pytest.raises(BadInput, match=r"input 'x' has the shape \[4, 4\]"):
        trt_from_onnx(relu, BATCH)


@pytest.mark.parametrize("batch", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_a_batch_range_that_is_none_is_refused(batch: tuple[int, int, int]) -> None:
    with pytest.raises(BadInput, match="smallest, usual and largest"):
        trt_from_onnx(pair(np.array(0, np.int8)), batch)


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="these bytes: no ONNX model"):
        trt_from_onnx(b"not a model", BATCH)
    with pytest.raises(BadInput, match="no such file"):
        trt_from_onnx(tmp_path / "missing.onnx", BATCH)


def test_without_tensorrt_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "_MODULES", ("tensorrt_that_is_not_there",))
    trt._library.cache_clear()
    try:
        assert builder_name() is None
        with pytest.raises(Missing, match="pip install tensorrt"):
            trt_from_onnx(pair(np.array(0, np.int8)), BATCH)
    finally:
        trt._library.cache_clear()
