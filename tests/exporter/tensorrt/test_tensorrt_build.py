import copy
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import nn

from convoynet.exporter.compression.sparsity import sparsify
from convoynet.exporter.engine_options import MIB, BuildOptions, Profile
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Interruptible, Quiet
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.float16 import to_bf16, to_fp16
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.recipe import Sparsify
from convoynet.exporter.tensorrt import layers
from convoynet.exporter.tensorrt.build import build
from convoynet.exporter.tensorrt.layers import Layer
from convoynet.exporter.tensorrt.library import find
from convoynet.exporter.tensorrt.monitor import Phases
from tests.exporter.engines import model_of, needs_tensorrt, pair, plan
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

T = TypeVar("T")
BATCH = (1, 2, 8)

pytestmark = needs_tensorrt


@pytest.fixture(scope="module")
def float_graph() -> onnx.ModelProto:
    """Of an opset that has bfloat16."""
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True, opset=22)


@pytest.fixture(scope="module")
def ranges(float_graph: onnx.ModelProto) -> dict[str, Range]:
    return calibrate(float_graph, [pixels(16)], "minmax")


def test_float_and_int8_engines_build_from_pixels(
    float_graph: onnx.ModelProto, ranges: dict[str, Range], tmp_path: Path
) -> None:
    int8 = quantize(float_graph, ranges, "gpu")
    assert len(plan(int8.SerializeToString(), BATCH)) > 10_000
    file = tmp_path / "model.onnx"
    file.write_bytes(float_graph.SerializeToString())
    assert len(plan(file, BATCH)) > 10_000


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_pixels_are_the_input_and_the_normalisation_a_part_of_the_engine(
    float_graph: onnx.ModelProto, ranges: dict[str, Range], precision: str
) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    model = copy.deepcopy(float_graph)
    if precision == "int8":
        model = quantize(model, ranges, "gpu")
    elif precision != "fp32":
        model = to_fp16(model, ranges) if precision == "fp16" else to_bf16(model)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    assert trt.OnnxParser(network, builder.logger).parse(model.SerializeToString())
    images = network.get_input(0)
    assert (images.dtype, tuple(images.shape)) == (trt.DataType.UINT8, (-1, 32, 32, 3))
    # UINT8 is a type of inputs and of casts alone: everything behind the first layer has another.
    first = network.get_layer(0)
    assert (first.type, first.get_output(0).dtype) == (trt.LayerType.CAST, trt.DataType.FLOAT)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape(images.name, (1, 32, 32, 3), (4, 32, 32, 3), (8, 32, 32, 3))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config)


def test_weights_beside_the_file_are_found(float_graph: onnx.ModelProto, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    model = onnx.ModelProto()
    model.CopyFrom(float_graph)
    onnx.save(model, str(file), save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size > 10_000
    assert len(plan(file, BATCH)) > 10_000


def test_the_cpu_graph_is_refused(float_graph: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    with pytest.raises(BadInput, match=r"UINT8.*--target gpu"):
        plan(quantize(float_graph, ranges, "cpu").SerializeToString(), BATCH)


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
        plan(model, BATCH)


@pytest.mark.parametrize("model", [pair(np.array(0, np.int8)), pair(None, output_dtype=onnx.TensorProto.INT8)])
def test_symmetric_int8_is_accepted_with_and_without_a_zero_point(model: bytes) -> None:
    assert plan(model, BATCH)


def test_a_raw_uint8_input_may_be_cast_but_not_dequantized() -> None:
    scale = {"scale": np.array(0.1, np.float32)}
    dequantize = helper.make_node("DequantizeLinear", ["x", "scale"], ["y"])
    with pytest.raises(BadInput, match="DequantizeLinear 'y' uses UINT8"):
        plan(model_of([dequantize], scale, onnx.TensorProto.UINT8), BATCH)
    cast = helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.FLOAT)
    assert plan(model_of([cast], {}, onnx.TensorProto.UINT8), BATCH)


def test_uint8_that_passes_other_nodes_is_found() -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("DequantizeLinear", ["flat", "scale"], ["y"]),
    ]
    with pytest.raises(BadInput, match="uses UINT8"):
        plan(model_of(nodes, {"scale": np.array(0.1, np.float32)}, onnx.TensorProto.UINT8), BATCH)


def test_an_int32_bias_is_refused() -> None:
    constants: dict[str, NDArray[np.generic]] = {"b": np.ones(4, np.int32), "scale": np.array(0.1, np.float32)}
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "scale"], ["bias"]),
        helper.make_node("Add", ["x", "bias"], ["y"]),
    ]
    with pytest.raises(BadInput, match="uses INT32"):
        plan(model_of(nodes, constants), BATCH)


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
        plan(model_of([choice], {"yes": np.array(True)}), BATCH)


def test_a_zero_point_that_is_computed_is_refused() -> None:
    nodes = [
        helper.make_node("Neg", ["zero"], ["computed"]),
        helper.make_node("QuantizeLinear", ["x", "scale", "computed"], ["q"], name="pair.q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "computed"], ["y"]),
    ]
    constants: dict[str, NDArray[np.generic]] = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.int8)}
    with pytest.raises(BadInput, match=r"'pair\.q' has a zero point that is computed"):
        plan(model_of(nodes, constants), BATCH)


def test_the_parsers_words_and_the_node_are_in_one_line() -> None:
    unknown = helper.make_node("NonZero", ["x"], ["indices"], name="where")
    cast = helper.make_node("Cast", ["indices"], ["y"], to=onnx.TensorProto.FLOAT)
    with pytest.raises(BadInput, match=r"TensorRT cannot read this graph: NonZero 'where'") as error:
        plan(model_of([unknown, cast], {}), BATCH)
    assert "\n" not in str(error.value)


def test_a_static_batch_must_be_the_one_asked_for() -> None:
    relu = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, shape=(4, 4))
    assert plan(relu, (4, 4, 4))
    with pytest.raises(BadInput, match=r"input 'x' has the shape \[4, 4\], so that batch 1:2:8 .* give --batch 4"):
        plan(relu, BATCH)


def test_a_dynamic_size_of_images_is_refused() -> None:
    relu = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, shape=("batch", "width"))
    with pytest.raises(BadInput, match=r"'x' has the shape \[-1, -1\]: .*--input-size"):
        plan(relu, BATCH)


def test_an_input_without_axes_is_refused_and_a_loop_is_built() -> None:
    relu = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, shape=())
    with pytest.raises(BadInput, match="input 'x' has no axes, and so no batch"):
        plan(relu, BATCH)
    weights = {"w": np.zeros((1, 8, 4), np.float32), "r": np.zeros((1, 8, 2), np.float32)}
    lstm = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=2)
    assert plan(model_of([lstm], weights, shape=("batch", 3, 4)), BATCH)


def test_a_graph_that_was_traced_at_one_batch_is_named_with_its_node() -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["m"], name="frozen")
    model = model_of([node, helper.make_node("Relu", ["m"], ["y"])], {"shape": np.array([2, 8])})
    with pytest.raises(BadInput, match=r"'frozen' does not take the batches of profile 0, 1:2:8: .*dynamic batch"):
        plan(model, BATCH)


def test_mixed_types_are_told_in_the_builders_words() -> None:
    node = helper.make_node("Add", ["x", "half"], ["y"], name="mixed")
    with pytest.raises(BadInput, match=r"Add 'mixed': mixed: .*same input types.*Float and Half") as error:
        plan(model_of([node], {"half": np.ones(4, np.float16)}), BATCH)
    assert "cudaError" not in str(error.value)
    assert "/_src" not in str(error.value)


def test_the_linter_explains_what_the_parser_refuses() -> None:
    node = helper.make_node("Unique", ["x"], ["y"], name="rows")
    with pytest.raises(BadInput, match=r"cannot read this graph: Unique 'rows' is no operator of .*express it by"):
        plan(model_of([node], {}), BATCH)


def test_too_little_workspace_is_told_with_the_flag(float_graph: onnx.ModelProto) -> None:
    options = BuildOptions((Profile(1, 2, 8),), workspace_bytes=MIB)
    with pytest.raises(BadInput, match="more scratch memory than 1 MiB: give a larger --workspace-mib"):
        build(float_graph.SerializeToString(), options, Quiet())


def test_several_profiles_and_every_option_that_needs_no_gpu(float_graph: onnx.ModelProto, tmp_path: Path) -> None:
    options = BuildOptions(
        (Profile(1, 1, 1), Profile(1, 8, 64)),
        optimization_level=5,
        workspace_bytes=1024 * MIB,
        timing_cache=tmp_path / "kernels",
        hardware_compatible=True,
        sparse_weights=True,
    )
    small = plan(float_graph.SerializeToString(), (1, 1, 1))
    built = build(float_graph.SerializeToString(), options, Quiet())
    assert len(built.content) > 1.5 * len(small)
    library = find()
    assert library is not None
    assert (built.library, built.version) == (library.name, library.version)
    assert built.seconds > 0
    if library.name == "tensorrt_rtx":
        assert built.compute_capability == "any"
        assert "compute capability 8.0, 8.6, 8.9, 12.0" in built.runs_on
        assert not (tmp_path / "kernels").exists()
        assert [note.partition(":")[0] for note in built.notes] == [
            "TensorRT-RTX needs no --hardware-compatible",
            "TensorRT-RTX has no timing cache",
        ]


def test_layers_say_what_they_compute_in(float_graph: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    int8 = quantize(float_graph, ranges, "gpu")
    built = build(int8.SerializeToString(), BuildOptions((Profile(*BATCH),)), Quiet())
    if built.inspected:
        pytest.skip("the engine is asked here, whose layers are fused")
    convolutions = [layer for layer in built.layers if layer.type == "CONVOLUTION"]
    assert len(convolutions) == 8
    assert {layer.computes for layer in convolutions} == {"int8"}
    assert {layer.precision for layer in convolutions} == {"fp32"}
    counts = layers.by_precision(built.layers)
    assert counts["int8"] >= 9
    assert set(counts) == {"int8", "fp32"}


@pytest.mark.parametrize(
    ("number", "half", "operands", "result"),
    [
        ("", "fp16", "fp16", "fp16"),
        ("", "bf16", "bf16", "bf16"),
        ("int8", "fp16", "int8", "fp16"),
        ("int8", "bf16", "int8", "bf16"),
        ("fp8", "", "fp8", "fp32"),
        ("fp8", "fp16", "fp8", "fp16"),
    ],
)
def test_every_layer_has_the_precision_that_was_asked_for(
    number: str, half: str, operands: str, result: str, float_graph: onnx.ModelProto, ranges: dict[str, Range]
) -> None:
    graph = quantize(float_graph, ranges, "gpu", (), number) if number else float_graph
    if half:
        graph = to_fp16(graph, ranges) if half == "fp16" else to_bf16(graph)
    built = build(graph.SerializeToString(), BuildOptions((Profile(*BATCH),)), Quiet())
    if built.inspected:
        pytest.skip("the engine is asked here, whose layers are fused")
    weighted = [layer for layer in built.layers if layer.type in {"CONVOLUTION", "MATRIX_MULTIPLY"}]
    assert len(weighted) == 9
    assert {layer.precision for layer in weighted} == {result}
    # The grouped and the first convolution stay in float under FP8; all others have what they were given.
    expected = {operands} if number != "fp8" else {operands, result}
    assert {layer.computes for layer in weighted} <= expected
    assert operands in {layer.computes for layer in weighted}


def test_weights_of_which_two_in_four_are_zero() -> None:
    layers = (nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.Flatten())
    sparse, masks, _ = sparsify(nn.Sequential(*layers).eval(), Sparsify())
    assert list(masks) == ["2.weight"]
    graph = onnx_from_torch(sparse, PREPROCESS, uint8_input=True)
    options = BuildOptions((Profile(*BATCH),), sparse_weights=True)
    for model in (graph, quantize(graph, calibrate(graph, [pixels(4)], "minmax"), "gpu")):
        assert len(build(model.SerializeToString(), options, Quiet()).content) > 10_000


def test_the_inspectors_words_become_precisions() -> None:
    """Its JSON as TensorRT's documentation and users show it; no engine was inspected here."""
    told = {
        "Layers": [
            {
                "Name": "conv + relu",
                "LayerType": "CaskConvolution",
                "Inputs": [{"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
                "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}],
            },
            {
                "Name": "Reformatting CopyNode",
                "LayerType": "Reformat",
                "Inputs": [{"Format/Datatype": "Row major linear FP32"}],
                "Outputs": [{"Format/Datatype": "Half NC/2HW2"}],
            },
            {"Name": "pool", "LayerType": "Pool", "Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]},
            "a name alone",
        ]
    }
    assert layers.of_engine(json.dumps(told)) == (
        Layer("conv + relu", "CaskConvolution", "fp16", ("int8",)),
        Layer("Reformatting CopyNode", "Reformat", "fp16", ("fp32",)),
        Layer("pool", "Pool", ""),
        Layer("a name alone", "", ""),
    )
    assert layers.by_precision(layers.of_engine(json.dumps(told))) == {"int8": 1, "fp32": 1}


def test_progress_rises_to_the_end(float_graph: onnx.ModelProto) -> None:
    shown = Watched()
    build(float_graph.SerializeToString(), BuildOptions((Profile(*BATCH),)), shown)
    assert [label.partition(" with ")[0] for label in shown.labels] == ["read the graph", "build an engine"]
    assert shown.items == list(range(1, 101))


def test_an_interrupt_ends_the_build(float_graph: onnx.ModelProto) -> None:
    shown = Watched()
    interrupted = Interruptible(shown, lambda: len(shown.items) >= 20)
    with pytest.raises(KeyboardInterrupt):
        build(float_graph.SerializeToString(), BuildOptions((Profile(*BATCH),)), interrupted)
    assert len(shown.items) < 100
    assert not [thread for thread in threading.enumerate() if thread.name == "tensorrt build"]


class Watched(Quiet):
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.items: list[object] = []

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        assert total == 100
        self.labels.append(label)
        for item in items:
            self.items.append(item)
            yield item

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        self.labels.append(label)
        yield


def test_the_share_of_nested_phases_never_falls() -> None:
    phases = Phases()
    phases.start("all", None, 2)
    phases.start("first", "all", 4)
    assert phases.step("first", 0) == 1 / 8
    phases.start("deep", "first", 2)
    assert phases.step("deep", 0) == 3 / 16
    phases.finish("deep")
    phases.finish("first")
    assert phases.step("unknown", 0) == 3 / 16
    assert phases.step("all", 0) == 1 / 2
    phases.start("second", "all", 1)
    assert phases.step("second", 0) == 1


@pytest.mark.parametrize("batch", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_a_batch_range_that_is_none_is_refused(batch: tuple[int, int, int]) -> None:
    with pytest.raises(BadInput, match="smallest, usual and largest"):
        plan(pair(np.array(0, np.int8)), batch)


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the model cannot be read as an ONNX model"):
        plan(b"not a model", BATCH)
    with pytest.raises(BadInput, match="no such file"):
        plan(tmp_path / "missing.onnx", BATCH)
