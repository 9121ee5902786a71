import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.commands import lint_command
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import Refused
from convoynet.exporter.graph.onnx_clean import fold_batch_norms
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.linting.graph import _NOT_IN_TENSORRT
from convoynet.exporter.linting.lint import RULES, lint, require_clean
from convoynet.exporter.linting.model import RUNTIMES, Finding
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.float16 import to_bf16, to_fp16
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.tensorrt.library import find, recorder
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

ROOT = Path(__file__).parents[3]
Constants = dict[str, NDArray[np.generic]]
FAMILIES = ("onnxruntime", "openvino", "tensorrt")
ONES = np.ones(4, np.float32)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    constants: Constants | None = None,
    *,
    opset: int = 20,
    ir: int = 10,
    shape: Sequence[str | int] = ("batch", 4, 8, 8),
    data_type: int = TensorProto.FLOAT,
    outputs: dict[str, Sequence[str | int] | None] | None = None,
) -> onnx.ModelProto:
    """x of `shape` -> `nodes` -> y."""
    graph = helper.make_graph(
        nodes,
        "linted",
        [helper.make_tensor_value_info("x", data_type, shape)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (outputs or {"y": None}).items()],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    domains = {"": opset, **{node.domain: 1 for node in nodes if node.domain}}
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*item) for item in domains.items()], ir_version=ir
    )


def found(model: onnx.ModelProto, runtime: str, folder: Path | None = None) -> dict[str, Finding]:
    """The first finding of each rule."""
    return {finding.rule: finding for finding in reversed(lint(model, RUNTIMES[runtime], folder=folder))}


def relu(**options: object) -> onnx.ModelProto:
    return model_of([helper.make_node("Relu", ["x"], ["y"], name="relu")], **options)  # type: ignore[arg-type]


def nowhere() -> onnx.ModelProto:
    """An operator whose input nobody gives."""
    return model_of([helper.make_node("Add", ["x", "nowhere"], ["y"], name="add")])


def pair(zero_point: NDArray[np.generic] | None, **attributes: int) -> onnx.ModelProto:
    names = ["scale"] if zero_point is None else ["scale", "zero"]
    constants: Constants = {"scale": np.array(0.1, np.float32)}
    if zero_point is not None:
        constants["zero"] = zero_point
    quantized = helper.make_node("QuantizeLinear", ["x", *names], ["q"], name="pair.q", **attributes)
    dequantized = helper.make_node("DequantizeLinear", ["q", *names], ["y"], name="pair.dq")
    return model_of([quantized, dequantized], constants, opset=21)


def integer_conv(
    outputs: int = 8, inputs: int = 8, scales: int | None = None, scale_type: type = np.float32, **options: int
) -> onnx.ModelProto:
    """A Conv of dequantized activations and INT8 weights."""
    constants: Constants = {
        "scale": np.array(0.1, np.float32),
        "zero": np.array(0, np.int8),
        "w": np.ones((outputs, inputs, 1, 1), np.int8),
        "w.scale": np.full(scales if scales is not None else outputs, 0.1, scale_type),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "w.scale"], ["w.dq"], name="w.dq", axis=0),
        helper.make_node("Conv", ["dq", "w.dq"], ["y"], name="conv"),
    ]
    return model_of(nodes, constants, shape=("batch", inputs, 8, 8), **options)  # type: ignore[arg-type]


def formed(name: str, values: NDArray[np.generic]) -> onnx.ModelProto:
    """An INT8 convolution one of whose tensors has another form."""
    model = integer_conv()
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return model


def scaled(scale: float) -> onnx.ModelProto:
    """Eight INT8 kernels, the third with a scale of its own."""
    model = integer_conv()
    values = np.full(8, 0.1, np.float32)
    values[2] = scale
    model.graph.initializer[3].CopyFrom(numpy_helper.from_array(values, "w.scale"))
    return model


def as_constant_nodes(model: onnx.ModelProto, *, identities: bool = False) -> onnx.ModelProto:
    """What other exporters write: Constant nodes for initializers, and perhaps an Identity behind each tensor."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    del made.graph.initializer[:]
    for node in [*nodes, *map(copy.deepcopy, model.graph.node)]:
        if identities and node.output[0] != "y":
            name = node.output[0]
            node.output[0] = f"{name}.before"
            nodes += [node] if node.op_type != "Constant" else []
            nodes.append(helper.make_node("Identity", [f"{name}.before"], [name]))
        elif node.op_type != "Constant":
            nodes.append(node)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def float_weights() -> onnx.ModelProto:
    constants: Constants = {"w": np.ones((8, 4, 1, 1), np.float32), "s": np.ones(8, np.float32)}
    constants["z"] = np.zeros(8, np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["w.q"], name="w.q", axis=0),
        helper.make_node("DequantizeLinear", ["w.q", "s", "z"], ["w.dq"], axis=0),
        helper.make_node("Conv", ["x", "w.dq"], ["y"]),
    ]
    return model_of(nodes, constants)


def int32_bias() -> onnx.ModelProto:
    constants: Constants = {"b": np.ones((4, 1, 1), np.int32), "scale": np.array(0.1, np.float32)}
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "scale"], ["bias"], name="bias.dq"),
        helper.make_node("Add", ["x", "bias"], ["y"]),
    ]
    return model_of(nodes, constants)


def batch_norm(between: str | None = None, **attributes: int) -> onnx.ModelProto:
    """A Conv, perhaps another operator, and a BatchNormalization."""
    constants: Constants = {"w": np.ones((4, 4, 1, 1), np.float32), "n": ONES}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"])]
    nodes += [helper.make_node(between, ["c"], ["d"])] if between else []
    last = nodes[-1].output[0]
    outputs = ["y", "mean", "var"] if attributes else ["y"]
    nodes.append(helper.make_node("BatchNormalization", [last, *["n"] * 4], outputs, name="bn", **attributes))
    return model_of(nodes, constants)


def dropout(*, training: bool) -> onnx.ModelProto:
    constants: Constants = {"ratio": np.array(0.5, np.float32), "training": np.array(training)}
    return model_of([helper.make_node("Dropout", ["x", "ratio", "training"], ["y"], name="drop")], constants)


def one(operator: str, domain: str = "", **options: object) -> onnx.ModelProto:
    return model_of([helper.make_node(operator, ["x"], ["y"], name="it", domain=domain)], **options)  # type: ignore[arg-type]


def resize(*, antialias: int) -> onnx.ModelProto:
    node = helper.make_node("Resize", ["x", "", "s"], ["y"], name="it", mode="linear", antialias=antialias)
    return model_of([node], {"s": np.array([1, 1, 0.5, 0.5], np.float32)})


def reading_pixels(first: str) -> onnx.ModelProto:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=1)]
    if first == "Transpose":
        nodes = [helper.make_node("Transpose", ["x"], ["t"], name="t"), helper.make_node("Cast", ["t"], ["y"], to=1)]
    return model_of(nodes, data_type=TensorProto.UINT8)


def two_outputs(shape: Sequence[str | int]) -> onnx.ModelProto:
    nodes = [helper.make_node("Flatten", ["x"], ["logits"]), helper.make_node("Flatten", ["x"], ["aux"])]
    return model_of(nodes, outputs={"logits": ("batch", 256), "aux": shape})


def weighted(value: NDArray[np.generic]) -> onnx.ModelProto:
    nodes = [helper.make_node("Cast", ["w"], ["c"], to=1), helper.make_node("Add", ["x", "c"], ["y"])]
    return model_of(nodes, {"w": value})


def branching() -> onnx.ModelProto:
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Relu", ["x"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name in ("then", "else")
    }
    return model_of([helper.make_node("If", ["yes"], ["y"], name="it", **branches)], {"yes": np.array(True)})


def typed_conv(data_type: int) -> onnx.ModelProto:
    """A Conv in another floating-point type."""
    kernel = numpy_helper.from_array(np.ones((4, 4, 1, 1), helper.tensor_dtype_to_np_dtype(data_type)), "w")
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=data_type),
        helper.make_node("Conv", ["h", "w"], ["c"], name="conv"),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, opset=22)
    model.graph.initializer.append(kernel)
    return model


def typed_scale(data_type: int) -> onnx.ModelProto:
    """An INT8 pair whose scales are of another floating-point type."""
    model = pair(np.array(0, np.int8))
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array(0.1, dtype), "scale"))
    ends = [
        helper.make_node("Cast", ["x"], ["h"], to=data_type),
        helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
    ]
    model.graph.node[0].input[0], model.graph.node[1].output[0] = "h", "d"
    model.graph.node.insert(0, ends[0])
    model.graph.node.append(ends[1])
    return model


def concat(data_type: int) -> onnx.ModelProto:
    """Two INT8 pairs, their values side by side, and another pair."""
    constants: Constants = {"s": np.array(0.1, helper.tensor_dtype_to_np_dtype(data_type)), "z": np.array(0, np.int8)}
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=data_type),
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Concat", ["d", "d"], ["c"], name="cat", axis=1),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["cd"]),
        helper.make_node("Cast", ["cd"], ["y"], to=TensorProto.FLOAT),
    ]
    return model_of(nodes, constants)


FP8_ZERO = np.zeros((), helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN))
FP16, BF16 = TensorProto.FLOAT16, TensorProto.BFLOAT16

# Rule, where it is an error, where a warning, a graph that has it, what the finding says, and a like graph without it.
CASES = [
    ("opset", "onnxruntime", "tensorrt", relu(opset=28), r"^the model has opset 28.*--opset", relu(opset=25)),
    ("ir-version", "onnxruntime", "", relu(ir=14), "IR version 14.*ir_version = 10", relu(ir=13)),
    ("training-mode", "*", "", dropout(training=True), r"'drop' drops.*\.eval\(\)", dropout(training=False)),
    ("training-mode", "*", "", batch_norm(training_mode=1), "'bn' normalises", batch_norm()),
    ("quantized-type", "tensorrt", "", pair(np.array(0, np.uint8)), "'pair.q' uses UINT8", pair(np.array(0, np.int8))),
    ("quantized-type", "tensorrt", "", pair(None), "'pair.q' uses UINT8", pair(None, output_dtype=TensorProto.INT8)),
    ("int32-bias", "tensorrt", "", int32_bias(), "'bias.dq' uses INT32.*QuantizeBias", pair(np.array(0, np.uint8))),
    ("zero-point", "tensorrt", "", pair(np.array(3, np.int8)), "zero point that is not 0", pair(np.array(0, np.int8))),
    ("scale", "*", "", scaled(0.0), "'w.dq' has 1 of 8 scales that are not above 0, such as 0", scaled(0.2)),
    ("scale", "*", "", scaled(float("nan")), "such as nan.*calibrate again", scaled(1e-6)),
    ("scale", "*", "", scaled(-0.1), "such as -0.1", scaled(0.2)),
    ("scale", "*", "", scaled(float("inf")), "such as inf", scaled(0.2)),
    ("scale", "*", "", formed("w.scale", np.ones((8, 1), np.float32)), "shape .8, 1.: without a block", scaled(0.2)),
    ("scale", "*", "", formed("w.scale", np.zeros(0, np.float32)), "has a scale without a number", scaled(0.2)),
    ("scale", "*", "", formed("w.scale", np.ones(8, np.int32)), "has a scale of INT32, which is no float", scaled(0.2)),
    ("scale", "*", "", formed("zero", np.zeros(3, np.int8)), "shape .. and zero points of .3.", scaled(0.2)),
    ("scale", "*", "", integer_conv(scales=5), "has 5 scales for 8 channels .axis 0.", integer_conv(scales=1)),
    ("quantization-opset", "*", "", integer_conv(opset=12), "'w.dq' needs opset 13.*states 12", integer_conv(opset=13)),
    (
        "quantization-opset", "*", "",
        integer_conv(opset=18, scale_type=np.float16), "needs opset 19", integer_conv(opset=19, scale_type=np.float16),
    ),
    ("uint8-input", "tensorrt", "", reading_pixels("Transpose"), "'t' reads the UINT8", reading_pixels("Cast")),
    ("unsupported-operator", "tensorrt", "", one("Unique"), "'it' is no operator.*other operators", one("Relu")),
    ("unsupported-operator", "tensorrt", "", one("DynamicQuantizeLinear"), "QuantFormat.QDQ", one("Relu")),
    ("unsupported-operator", "tensorrt", "", resize(antialias=1), "with antialiasing", resize(antialias=0)),
    (
        "no-kernel", "onnxruntime", "",
        one("GlobalAveragePool", data_type=TensorProto.DOUBLE), "for DOUBLE in the ONNX Runtime.*float32", one("Relu"),
    ),
    ("no-kernel", "openvino", "", one("Det"), "'it' has no implementation in the OpenVINO", one("Relu")),
    ("no-kernel", "onnxruntime openvino", "", one("Nonsense"), "'it' has no implementation", one("Relu")),
    ("custom-operator", "onnxruntime openvino", "tensorrt", one("Mine", "my.ops"), "domain 'my.ops'", one("Relu")),
    ("custom-operator", "", "tensorrt", one("Gelu", "com.microsoft"), "domain 'com.microsoft'", one("Gelu")),
    ("data-dependent", "", "*", one("NonZero"), "as many rows as the data says.*TopK", one("Relu")),
    ("data-dependent", "", "onnxruntime openvino", one("Unique"), "told apart by rows", one("Relu")),
    ("control-flow", "", "tensorrt", branching(), "'it' is control flow.*unroll", one("Relu")),
    ("signed-activations", "", "onnxruntime", integer_conv(), "'q' makes INT8", pair(np.array(0, np.uint8))),
    ("fp8", "onnxruntime", "", pair(FP8_ZERO), "'pair.q' makes FP8.*ReLU", pair(np.array(0, np.int8))),
    ("fp16-scale", "onnxruntime", "", concat(FP16), "'cat' stands between", concat(TensorProto.FLOAT)),
    ("bfloat16", "onnxruntime", "", typed_conv(BF16), "'conv' is in bfloat16.*--target gpu", typed_conv(FP16)),
    ("bfloat16", "onnxruntime", "", typed_scale(BF16), "'pair.q' is in bfloat16", typed_scale(FP16)),
    ("bfloat16-scale", "openvino", "", typed_scale(BF16), "'pair.dq' has a scale in bfloat16", typed_scale(FP16)),
    ("fp16", "", "onnxruntime", typed_conv(FP16), "'conv' is in FP16.*float32 or INT8", one("Relu")),
    ("float-weights", "", "*", float_weights(), "'w.q' quantizes stored weights", integer_conv()),
    ("per-tensor-weights", "", "*", integer_conv(scales=1), "'conv' has one scale.*per_channel", integer_conv()),
    ("per-tensor-weights", "", "*", integer_conv(scales=1), "'conv' has one scale", integer_conv(outputs=1, scales=1)),
    ("odd-channels", "", "tensorrt", integer_conv(outputs=12), "8 input and 12 output channels", integer_conv()),
    ("odd-channels", "", "tensorrt", integer_conv(inputs=9), "9 input", integer_conv(inputs=3)),  # pixels
    ("batch-norm", "", "*", batch_norm(), "'bn' could be folded.*dynamo=True", batch_norm("Relu")),
    ("auxiliary-output", "", "*", two_outputs(("batch", 256)), "'aux' has the shape of", two_outputs(("batch", 64))),
    ("static-batch", "", "*", relu(shape=(1, 3, 8, 8)), "'x' has a fixed batch of 1", relu()),
    ("dynamic-size", "", "tensorrt", relu(shape=("n", 3, "h", "w")), "dynamic axes.*--input-size", relu()),
    ("wide-numbers", "", "*", weighted(np.ones(8)), "'w' are FLOAT64", weighted(np.ones(8, np.int64))),
    ("invalid", "", "*", nowhere(), "no valid ONNX.*nowhere", relu()),
    ("refused", "onnxruntime openvino", "", nowhere(), "refused by the .* installed here: .*nowhere", relu()),
    ("wide-numbers", "", "*", weighted(np.ones((160, 8), np.int64)), "1280 INT64", weighted(np.ones(999, np.int64))),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "errors", "warnings", "bad", "message", "good"), CASES)
def test_rule(rule: str, errors: str, warnings: str, bad: onnx.ModelProto, message: str, good: onnx.ModelProto) -> None:
    expected = dict.fromkeys(FAMILIES if errors == "*" else errors.split(), "error")
    expected |= dict.fromkeys(FAMILIES if warnings == "*" else warnings.split(), "warning")
    before = bad.SerializeToString()
    findings = {runtime: found(bad, runtime).get(rule) for runtime in FAMILIES}
    assert {runtime: item.severity for runtime, item in findings.items() if item is not None} == expected
    assert any(item is not None and re.search(message, item.line) for item in findings.values())
    assert not [runtime for runtime in FAMILIES if rule in found(good, runtime)]
    assert bad.SerializeToString() == before


@pytest.mark.parametrize("identities", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case[3].graph.initializer], ids=lambda case: case[4])
def test_constant_nodes_and_identities_are_seen_through(case: tuple[Any, ...], identities: bool) -> None:
    for model in (case[3], case[5]):
        written = as_constant_nodes(model, identities=identities)
        for runtime in FAMILIES:
            assert set(found(written, runtime)) == set(found(model, runtime))


def test_constants_are_seen_within_control_flow() -> None:
    model = branching()
    then = model.graph.node[0].attribute[0].g
    del then.node[:]
    then.node.extend(as_constant_nodes(scaled(0.0), identities=True).graph.node)
    then.node[-1].output[0] = then.output[0].name
    assert "1 of 8 scales" in found(model, "tensorrt")["scale"].message


def test_every_rule_has_a_case_and_a_line_in_the_documentation() -> None:
    tested = {case[0] for case in CASES} | {"external-data"}
    assert {rule.name for rule in RULES} == tested
    documented = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs" / "linting.md").read_text(), re.MULTILINE)
    assert documented == [rule.name for rule in RULES]


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    exported = onnx_from_torch(small_net(), PREPROCESS, uint8_input=True, opset=22)
    ranges = calibrate(exported, [pixels(16)], "minmax")
    graphs = {"fp32": exported, **{target: quantize(exported, ranges, target) for target in ("cpu", "gpu")}}
    graphs |= {"fp16": to_fp16(exported, ranges), "bf16": to_bf16(exported)}
    graphs |= {"gpu+fp16": to_fp16(graphs["gpu"], ranges), "gpu+bf16": to_bf16(graphs["gpu"])}
    graphs["fp8+fp16"] = to_fp16(quantize(exported, ranges, "gpu", (), "fp8"), ranges)
    return graphs


@pytest.mark.parametrize(
    ("kind", "runtime", "expected"),
    [
        *[("fp32", name, set()) for name in RUNTIMES],
        ("cpu", "onnxruntime", set()),
        ("cpu", "openvino", set()),
        ("cpu", "tensorrt", {("quantized-type", "error"), ("int32-bias", "error")}),
        ("gpu", "tensorrt", set()),
        ("gpu", "onnxruntime", {("signed-activations", "warning")}),
        *[(kind, "tensorrt", set()) for kind in ("fp16", "bf16", "gpu+fp16", "gpu+bf16", "fp8+fp16")],
        ("fp16", "onnxruntime", {("fp16", "warning")}),
        ("bf16", "onnxruntime", {("bfloat16", "error")}),
        ("fp8+fp16", "onnxruntime", {("fp8", "error"), ("fp16", "warning")}),
        ("gpu+fp16", "openvino", set()),
        ("gpu+fp16", "onnxruntime", {("signed-activations", "warning"), ("fp16", "warning"), ("fp16-scale", "error")}),
        ("gpu+bf16", "openvino", {("bfloat16-scale", "error")}),
    ],
)
def test_convoys_own_graphs(
    kind: str, runtime: str, expected: set[tuple[str, str]], graphs: dict[str, onnx.ModelProto]
) -> None:
    findings = lint(graphs[kind], RUNTIMES[runtime])
    assert {(finding.rule, finding.severity) for finding in findings} == expected


def test_a_graph_for_the_other_target_is_refused(graphs: dict[str, onnx.ModelProto]) -> None:
    require_clean(graphs["cpu"], "cpu")
    require_clean(graphs["gpu"], "gpu")
    require_clean(graphs["gpu"], "cpu")  # slow there, and right
    with pytest.raises(
        Refused, match=r"none for TensorRT: QuantizeLinear '.*' uses UINT8.*more\); nothing was published"
    ):
        require_clean(graphs["cpu"], "gpu")


NETS = """
from torch import nn

class Bits(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x)
        return self.head((x * ((x * 4).int() & 3).float()).mean((2, 3)))
"""


def test_an_export_publishes_nothing_that_the_linter_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "linted_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def export(target: str) -> None:
        root = tmp_path / target
        run(
            ExportConfig("linted_nets:Bits", repository=root, input_size=(16, 16), target=target, weights="random"),
            Quiet(),
        )

    export("cpu")
    assert (tmp_path / "cpu" / "Bits" / "1" / "model.onnx").is_file()
    with pytest.raises(Refused, match=r"BitwiseAnd .* is no operator of TensorRT's parser; .*nothing was published"):
        export("gpu")
    assert not (tmp_path / "gpu" / "Bits").exists()


def test_a_folded_batch_norm_is_no_finding_any_more() -> None:
    model = batch_norm()
    fold_batch_norms(model)
    assert "batch-norm" not in found(model, "onnxruntime")


def stored_outside(folder: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    file = folder / "model.onnx"
    onnx.save(model, str(file), save_as_external_data=True, location="weights.bin", size_threshold=0)
    return onnx.load(file, load_external_data=False)


def test_weights_beside_the_file(tmp_path: Path) -> None:
    model = stored_outside(tmp_path, pair(np.array(3, np.int8)))
    assert set(found(model, "onnxruntime", tmp_path)) == {"signed-activations"}
    # The zero point is looked up there as well.
    assert set(found(model, "tensorrt", tmp_path)) == {"zero-point"}
    (tmp_path / "elsewhere").mkdir()
    missing = found(model, "tensorrt", tmp_path / "elsewhere")
    assert set(missing) == {"external-data"}
    assert missing["external-data"].line.startswith("the weights' file 'weights.bin' is missing; copy it")
    with (tmp_path / "weights.bin").open("r+b") as file:
        file.truncate(1)
    assert "is shorter" in found(model, "openvino", tmp_path)["external-data"].message
    for tensor in model.graph.initializer:
        next(item for item in tensor.external_data if item.key == "location").value = "../weights.bin"
    (finding,) = lint(model, RUNTIMES["openvino"], folder=tmp_path / "elsewhere")
    assert "is outside" in finding.message
    assert not found(model, "openvino")  # from memory: nobody knows where it would lie


def test_a_zero_point_that_is_computed_is_found() -> None:
    model = pair(np.array(0, np.int8))
    model.graph.node.insert(0, helper.make_node("Neg", ["zero"], ["computed"]))
    for node in list(model.graph.node)[1:]:
        node.input[2] = "computed"
    assert "is computed" in found(model, "tensorrt")["zero-point"].message


def test_a_function_of_the_models_own_is_no_custom_operator() -> None:
    body = [helper.make_node("Unique", ["a"], ["b"], name="inner")]
    model = one("Mine", "my.ops")
    opsets = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("my.ops", "Mine", ["a"], ["b"], body, opsets))
    findings = found(model, "tensorrt")
    assert "custom-operator" not in findings
    assert findings["unsupported-operator"].node == "Unique 'inner'"


def test_the_newest_opset_differs_between_versions_of_tensorrt() -> None:
    assert "9 to 24" in found(relu(opset=25), "tensorrt10")["opset"].message
    assert not found(relu(opset=25), "tensorrt11")
    assert "opset" in found(relu(opset=8), "tensorrt")


def test_onnx_runtime_reads_what_the_linter_says_and_no_more() -> None:
    runtime = RUNTIMES["onnxruntime"]
    assert runtime.opsets is not None
    assert runtime.ir is not None
    newest = runtime.opsets.stop - 1
    onnxruntime.InferenceSession(relu(opset=newest, ir=runtime.ir).SerializeToString())
    if onnxruntime.__version__.startswith("1.31."):
        for model in (relu(opset=newest + 1), relu(ir=runtime.ir + 1)):
            with pytest.raises(Exception, match=r"opset|IR version"):
                onnxruntime.InferenceSession(model.SerializeToString())


def test_tensorrts_parser_has_none_of_the_unsupported_operators() -> None:
    library = find()
    if library is None:
        pytest.skip("needs tensorrt or tensorrt_rtx: pip install tensorrt-rtx")
    logger = recorder(library)
    network = library.module.Builder(logger).create_network(0)
    parser = library.module.OnnxParser(network, logger)
    assert not [name for name in _NOT_IN_TENSORRT if parser.supports_operator(name)]


def test_command(tmp_path: Path, graphs: dict[str, onnx.ModelProto], capsys: pytest.CaptureFixture[str]) -> None:
    for version, kind in (("1", "fp32"), ("2", "cpu")):
        (tmp_path / "net" / version).mkdir(parents=True)
        onnx.save(graphs[kind], tmp_path / "net" / version / "model.onnx")
    assert lint_command.lint([str(tmp_path / "net" / "1"), "--for", "tensorrt", "--for", "openvino"]) == 0
    assert capsys.readouterr().out.count("nothing found") == 2
    assert lint_command.lint([str(tmp_path / "net")]) == 3  # the newest version, for both runtimes
    out, err = capsys.readouterr()
    assert not err
    summary, wrong = (line for line in out.splitlines() if line.startswith(str(tmp_path)))
    assert summary.endswith("for ONNX Runtime: nothing found")
    assert re.search(r"for TensorRT: \d+ errors$", wrong)
    words = " ".join(out.split())
    assert re.search(r"error int32-bias DequantizeLinear '[^']+' and \d+ more: uses INT32: .* fix: keep biases", words)
    assert max(map(len, out.splitlines())) <= max(120, len(wrong))

    onnx.save(relu(shape=(1, 3, 8, 8)), tmp_path / "fixed.onnx")
    assert lint_command.lint([str(tmp_path / "fixed.onnx"), "--for", "onnxruntime"]) == 0
    assert "1 warning\n" in capsys.readouterr().out


def test_command_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(int32_bias(), file)
    assert lint_command.lint([str(file), "--json", "--for", "tensorrt11"]) == 3
    assert json.loads(capsys.readouterr().out) == {
        "file": str(file),
        "runtimes": [
            {
                "runtime": "tensorrt11",
                "errors": 1,
                "warnings": 0,
                "findings": [
                    {
                        "rule": "int32-bias",
                        "severity": "error",
                        "node": "DequantizeLinear 'bias.dq'",
                        "message": "uses INT32: TensorRT dequantizes no INT32, and biases are INT32 here",
                        "fix": "keep biases in float: quantize for --target gpu (in onnxruntime.quantization "
                        "QuantizeBias: False)",
                    }
                ],
            }
        ],
    }


def test_what_cannot_be_linted_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.onnx").write_text("this is no model")
    idle = relu()
    del idle.graph.node[0].output[:]
    onnx.save(idle, tmp_path / "idle.onnx")
    onnx.save(one("QuantizeLinear"), tmp_path / "short.onnx")
    for arguments, message in (
        ([str(tmp_path / "missing.onnx")], "no such file"),
        ([str(tmp_path)], "holds no model.onnx"),
        ([str(tmp_path / "text.onnx")], "cannot be read as an ONNX model"),
        ([str(tmp_path / "idle.onnx")], "Relu 'relu' has no output"),
        ([str(tmp_path / "short.onnx")], "QuantizeLinear 'it' has fewer than 2 inputs"),
        ([str(tmp_path / "text.onnx"), "--for", "tflite"], "invalid choice: 'tflite'"),
    ):
        assert lint_command.lint(arguments) == 2
        out, err = capsys.readouterr()
        assert not out
        assert message in err
        assert err.count("\n") == 1
    assert tuple(RUNTIMES) == lint_command._RUNTIMES
