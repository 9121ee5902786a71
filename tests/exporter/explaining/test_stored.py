"""Explanations for graphs whose weights or activations are stored as integers, or are made by nodes."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.helper import make_node
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput
from convoynet.exporter.explaining.grad_cam import explained
from convoynet.exporter.explaining.reference import reference_maps
from convoynet.exporter.graph.onnx_from_given import onnx_from_given
from convoynet.exporter.graph.onnx_given import plain, read_given
from convoynet.exporter.publishing.explained_model import explain_file
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from tests.exporter.onnx_runs import session_of

Array = NDArray[np.float32]
CHANNELS, HIDDEN, CLASSES, SIDE = 6, 12, 5, 4
IMAGES = np.random.default_rng(8).standard_normal((4, 1, SIDE + 2, SIDE + 2)).astype(np.float32)
ASKED = np.arange(CLASSES)
CHOSEN = np.array([1, 4, 0, 2])
PREPROCESS = Preprocess((SIDE + 2,) * 2, SIDE + 2, (0.5,), (0.5,))


class Made:
    """A graph that is written node by node: a convolution, a ReLU, and what the test has behind them."""

    def __init__(self, seed: int = 3) -> None:
        self._random = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.kept: list[TensorProto] = []

    def numbers(self, *shape: int) -> Array:
        return (self._random.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)

    def store(self, values: object) -> str:
        self.kept.append(numpy_helper.from_array(np.asarray(values), f"kept_{len(self.kept)}"))
        return self.kept[-1].name

    def add(self, operator: str, *read: object, output: str = "", **attributes: object) -> str:
        names = [each if isinstance(each, str) else self.store(each) for each in read]
        name = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(make_node(operator, names, [name], name=name, **attributes))
        return name

    def row(self) -> str:
        kernel = self.numbers(CHANNELS, 1, 3, 3)
        made = self.add("Relu", self.add("Conv", "input", kernel, self.numbers(CHANNELS), kernel_shape=[3, 3]))
        return self.add("Flatten", self.add("GlobalAveragePool", made))

    def model(self, score: str, opset: int = 20, size: tuple[int | str, ...] = IMAGES.shape[1:]) -> onnx.ModelProto:
        for names in [*(node.input for node in self.nodes), *(node.output for node in self.nodes)]:
            names[:] = ["logits" if name == score else name for name in names]
        images = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", *size])
        scores = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])
        graph = helper.make_graph(self.nodes, "net", [images], [scores], self.kept)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def paired(made: Made, name: str, scale: float, zero: np.generic, *, moved: bool = False) -> str:
    pair = np.float32(scale), zero
    name = made.add("QuantizeLinear", name, *pair)
    if moved:
        name = made.add("Reshape", name, np.array([-1, HIDDEN]))
    return made.add("DequantizeLinear", name, *pair)


def explanations(model: onnx.ModelProto, folder: Path, images: Array = IMAGES) -> tuple[Array, Array]:
    """The scores, and the maps of each class, [classes, n, height, width], of a file that got the output."""
    onnx.save(model, folder / "net.onnx")
    made, _ = explain_file(folder / "net.onnx")
    return of_classes(made, images)


def of_classes(made: onnx.ModelProto, images: Array = IMAGES) -> tuple[Array, Array]:
    session = session_of(made)
    found = []
    for index in ASKED:
        asked = {"input": images, "explain_class": np.full((len(images), 1), index)}
        scores, maps = session.run(["logits", "explanation"], asked)
        found.append(maps)
    return scores, np.stack(found)


def apart(found: Array, wanted: Array) -> float:
    """The largest distance, as a share of each class's largest evidence."""
    return float((np.abs(found - wanted).max((1, 2, 3)) / wanted.max((1, 2, 3))).max())


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("hidden", [False, True])
def test_what_a_layer_adds_is_evidence_too(beta: float, hidden: bool, tmp_path: Path) -> None:
    made = Made()
    row = made.row()
    direct = made.add("Gemm", row, made.numbers(CHANNELS, CLASSES))
    score = made.add("Gemm", row, made.numbers(CHANNELS, CLASSES), direct, beta=beta)
    if hidden:
        score = made.add("Gemm", made.add("Relu", score), made.numbers(CLASSES, CLASSES))
    model = made.model(score)
    _, found = explanations(model, tmp_path)
    for index, maps in enumerate(found):
        wanted = reference_maps(plain(model), IMAGES, np.full(len(IMAGES), index))
        np.testing.assert_allclose(maps, wanted, atol=1e-5 * wanted.max())


def with_relu(kind: type[np.integer] | None, scale: float = 0.01, *, moved: bool = False) -> onnx.ModelProto:
    """A hidden layer behind a ReLU, or behind integers of which the least is 0."""
    made = Made(4)
    name = made.add("Gemm", made.row(), made.numbers(CHANNELS, HIDDEN), made.numbers(HIDDEN))
    zero = np.uint8(0) if kind is None else kind(np.iinfo(kind).min)
    name = made.add("Relu", name) if kind is None else paired(made, name, scale, zero, moved=moved)
    return made.model(made.add("Gemm", name, made.numbers(HIDDEN, CLASSES)), 21)


@pytest.mark.parametrize(
    ("kind", "moved"),
    [(np.uint8, False), (np.int8, False), (np.uint16, False), (np.int16, False), (np.uint8, True), (np.int8, True)],
)
def test_integers_whose_least_is_zero_are_a_relu(kind: type[np.integer], moved: bool, tmp_path: Path) -> None:
    scores, found = explanations(with_relu(kind, moved=moved), tmp_path)
    wanted_scores, wanted = explanations(with_relu(None), tmp_path)
    assert np.abs(scores - wanted_scores).max() < 0.05
    assert apart(found, wanted) < 1e-5


def test_they_are_between_the_map_and_its_layer_too(tmp_path: Path) -> None:
    def graph(*, rounded: bool) -> onnx.ModelProto:
        made = Made()
        name = made.add("Conv", "input", made.numbers(CHANNELS, 1, 3, 3), kernel_shape=[3, 3])
        name = made.add("Flatten", name if rounded else made.add("Relu", name))
        name = paired(made, name, 0.005, np.uint8(0)) if rounded else name
        return made.model(made.add("Gemm", name, made.numbers(CHANNELS * SIDE * SIDE, CLASSES)))

    # Of the map of the convolution, not of the ReLU's: its negative numbers have a weight, and no gradient.
    rounded = graph(rounded=True)
    _, found = explanations(rounded, tmp_path)
    kernel, weights = (numpy_helper.to_array(rounded.graph.initializer[at]) for at in (0, -1))
    windows = np.lib.stride_tricks.sliding_window_view(IMAGES[:, 0], (3, 3), (1, 2))
    features = np.einsum("nhwij,cij->nchw", windows, kernel[:, 0])
    slopes = weights.T.reshape(CLASSES, 1, CHANNELS, SIDE, SIDE) * (features > 0.0025)
    wanted = np.maximum((slopes.mean((3, 4), keepdims=True) * features).sum(2), 0)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * wanted.max())
    assert apart(of_classes(explained(plain(graph(rounded=False))))[1], wanted) > 0.01


@pytest.mark.parametrize("ends", [(0.0, 0.3), (-0.2, 0.2), (0.0, 6.0)])
def test_a_clip_that_quantization_removes_cuts_off_still(ends: tuple[float, float], tmp_path: Path) -> None:
    made = Made(6)
    name = made.add("Gemm", made.row(), made.numbers(CHANNELS, HIDDEN), 0.2 * made.numbers(HIDDEN))
    name = made.add("Clip", name, *map(np.float32, ends))
    model = plain(made.model(made.add("Gemm", name, made.numbers(HIDDEN, CLASSES))))
    small = quantize(model, calibrate(model, [IMAGES], "minmax"), "cpu")
    # Where 0 is not in the middle of the integers the range is larger than the activation's, which stays.
    assert ("Clip" in {node.op_type for node in small.graph.node}) == (ends[0] < 0)
    scores, found = of_classes(explained(small))
    wanted_scores, wanted = of_classes(explained(model))
    assert np.abs(scores - wanted_scores).max() < 0.05
    # A unit that is nearly at an end may be rounded to it, and has no gradient then: not in most of the images.
    assert np.median(np.abs(found - wanted).max((0, 2, 3))) < 0.05 * wanted.max()
    onnx.save(small, tmp_path / "small.onnx")
    outputs = {"logits": ("logits", [CLASSES])}
    again = onnx_from_given(read_given(tmp_path / "small.onnx"), outputs, PREPROCESS, uint8_input=False)
    np.testing.assert_array_equal(of_classes(explained(again))[1], found)


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self._left = iter([{"input": IMAGES}])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._left, None)


@pytest.mark.parametrize(
    ("opset", "kind", "per_channel"),
    [*itertools.product((13, 21), (QuantType.QUInt8, QuantType.QInt8), (False, True))],
)
def test_graphs_that_onnx_runtime_quantizes(opset: int, kind: QuantType, per_channel: bool, tmp_path: Path) -> None:
    made = Made(5)
    name = made.add("Relu", made.add("Gemm", made.row(), made.numbers(CHANNELS, HIDDEN), made.numbers(HIDDEN)))
    model = made.model(made.add("Gemm", name, made.numbers(HIDDEN, CLASSES), made.numbers(CLASSES)), opset)
    _, wanted = explanations(model, tmp_path)
    files = [str(tmp_path / name) for name in ("net.onnx", "small.onnx")]
    quantize_static(
        *files,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=kind,
        weight_type=QuantType.QInt8,
    )
    small, _ = explain_file(Path(files[1]))
    # A unit that is nearly 0 may be rounded to 0, and has no gradient then.
    assert np.median(np.abs(of_classes(small)[1] - wanted)) < 0.02 * wanted.max()


@pytest.mark.parametrize(("scales", "opset"), [((), 20), ((), 12), ((1,), 20), ((CLASSES,), 20), ((CLASSES,), 13)])
@pytest.mark.parametrize("zero", [np.uint8(128), np.int8(0)])
@pytest.mark.parametrize("turned", [False, True])
def test_integers_of_the_last_layer(
    scales: tuple[int, ...], opset: int, zero: np.generic, turned: bool, tmp_path: Path
) -> None:
    made = Made()
    name = paired(made, made.row(), 0.02, zero)
    integers = np.random.default_rng(1).integers(-127, 128, (CHANNELS, CLASSES)).astype(np.int8)
    each = np.linspace(0.005, 0.02, CLASSES).astype(np.float32)[: int(np.prod(scales))].reshape(scales)
    stored = integers.T.copy() if turned else integers
    along = {"axis": 0 if turned else 1} if scales else {}
    weights = made.add("DequantizeLinear", stored, each, np.zeros(scales, np.int8), **along)
    model = made.model(made.add("Gemm", name, weights, made.numbers(CLASSES), transB=int(turned)), opset)
    onnx.save(model, tmp_path / "net.onnx")
    graph, told = explain_file(tmp_path / "net.onnx")
    graph.graph.output.append(helper.make_tensor_value_info(told.features, TensorProto.FLOAT, None))
    features, maps = session_of(graph).run(
        [told.features, "explanation"], {"input": IMAGES, "explain_class": CHOSEN[:, None]}
    )
    rows = (integers * each).T[CHOSEN]
    wanted = np.maximum((rows[:, :, None, None] * features).sum(1) / SIDE**2, 0)
    np.testing.assert_allclose(maps, wanted, atol=1e-5 * wanted.max())


@pytest.mark.parametrize("how", ["cast", "turned", "of length one", "filled", "a shape of the image"])
def test_what_is_made_of_stored_tensors_may_stand_anywhere(how: str, tmp_path: Path) -> None:
    made = Made()
    weights, bias = made.numbers(CHANNELS, CLASSES), np.zeros(CLASSES, np.float32)
    matrix: object = weights
    if how == "cast":
        matrix = made.add("Cast", weights.astype(np.float16), to=TensorProto.FLOAT)
    elif how == "turned":
        matrix = made.add("Transpose", weights.T.copy(), perm=[1, 0])
    elif how == "of length one":
        matrix = made.add("Div", weights, made.add("ReduceL2", weights, np.array([0]), keepdims=1))
    shape: object = np.array([-1, CHANNELS])
    if how == "filled":
        added: object = made.add("ConstantOfShape", np.array([CLASSES]))
    else:
        added = bias
    if how == "a shape of the image":
        rows = made.add("Slice", made.add("Shape", "input"), np.array([0]), np.array([1]))
        shape = made.add("Concat", rows, np.array([-1]), axis=0)
    row = made.add("Reshape", made.row(), shape)
    model = made.model(made.add("Gemm", row, matrix, added))
    _, found = explanations(model, tmp_path)
    used = {
        "cast": weights.astype(np.float16).astype(np.float32),
        "of length one": weights / np.linalg.norm(weights, axis=0),
    }
    features = features_of(model)
    wanted = np.maximum(np.einsum("nchw,ck->knhw", features, used.get(how, weights)) / SIDE**2, 0)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * wanted.max())


def features_of(model: onnx.ModelProto) -> Array:
    """What the first ReLU makes of the images."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    name = next(node.output[0] for node in shown.graph.node if node.op_type == "Relu")
    shown.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    (features,) = session_of(shown).run([name], {"input": IMAGES})
    return np.asarray(features)


def test_axes_that_onnxs_converter_states_are_read(tmp_path: Path) -> None:
    made = Made()
    name = made.add("Relu", made.add("Conv", "input", made.numbers(CHANNELS, 1, 3, 3), kernel_shape=[3, 3]))
    mean = made.add("ReduceMean", name, axes=[2, 3], keepdims=0)
    weights = made.numbers(CHANNELS, CLASSES)
    onnx.save(model := made.model(made.add("Gemm", mean, weights), 17), tmp_path / "net.onnx")
    given = read_given(tmp_path / "net.onnx")
    newer = onnx_from_given(given, {"logits": ("logits", [CLASSES])}, PREPROCESS, uint8_input=False, opset=20)
    _, found = of_classes(explained(newer))
    wanted = np.maximum(np.einsum("nchw,ck->knhw", features_of(model), weights) / SIDE**2, 0)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * wanted.max())


def test_a_mean_over_the_images_is_refused(tmp_path: Path) -> None:
    """No axes are all of them."""
    made = Made()
    row = made.row()
    mean = made.add("ReduceMean", row, np.array([], np.int64), keepdims=0)
    score = made.add("Mul", made.add("Gemm", row, made.numbers(CHANNELS, CLASSES)), mean)
    with pytest.raises(BadInput, match=r"needs the gradient of ReduceMean .* over the images"):
        explanations(made.model(score), tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("open", "'conv_0' has no fixed size: fix the height and width"),
        ("double", "'conv_1' is DOUBLE, and features"),
    ],
)
def test_what_keeps_a_map_from_being_one_is_said(change: str, reason: str, tmp_path: Path) -> None:
    made = Made()
    kind = np.float64 if change == "double" else np.float32
    name = made.add("Cast", "input", to=TensorProto.DOUBLE) if change == "double" else "input"
    name = made.add("Conv", name, made.numbers(CHANNELS, 1, 3, 3).astype(kind), kernel_shape=[3, 3])
    name = made.add("Flatten", made.add("GlobalAveragePool", name))
    name = made.add("Gemm", name, made.numbers(CHANNELS, CLASSES).astype(kind))
    name = made.add("Cast", name, to=TensorProto.FLOAT) if change == "double" else name
    model = made.model(name, size=(1, "h", "w") if change == "open" else IMAGES.shape[1:])
    with pytest.raises(BadInput, match=reason):
        explanations(model, tmp_path)


def test_activations_with_a_scale_for_each_channel_hand_the_gradient_on(tmp_path: Path) -> None:
    def graph(*, rounded: bool) -> onnx.ModelProto:
        made = Made()
        name = made.add("Gemm", made.row(), made.numbers(CHANNELS, HIDDEN))
        if rounded:
            pair = np.linspace(0.01, 0.02, HIDDEN).astype(np.float32), np.zeros(HIDDEN, np.int8)
            name = made.add("DequantizeLinear", made.add("QuantizeLinear", name, *pair, axis=1), *pair, axis=1)
        return made.model(made.add("Gemm", name, made.numbers(HIDDEN, CLASSES)), 21)

    _, found = explanations(graph(rounded=True), tmp_path)
    _, wanted = explanations(graph(rounded=False), tmp_path)
    assert apart(found, wanted) < 1e-5


@pytest.mark.parametrize("turned", [False, True])
def test_integers_with_scales_of_half_precision(turned: bool, tmp_path: Path) -> None:
    made = Made()
    integers = np.random.default_rng(1).integers(-127, 128, (CHANNELS, CLASSES)).astype(np.int8)
    stored = integers.T.copy() if turned else integers
    weights = made.add("DequantizeLinear", stored, np.float16(0.01))
    half = made.add("Cast", made.row(), to=TensorProto.FLOAT16)
    score = made.add("Cast", made.add("Gemm", half, weights, transB=int(turned)), to=TensorProto.FLOAT)
    model = made.model(score)
    _, found = explanations(model, tmp_path)
    wanted = np.einsum("nchw,ck->knhw", features_of(model), integers * np.float32(np.float16(0.01))) / SIDE**2
    np.testing.assert_allclose(found, np.maximum(wanted, 0), atol=2e-3 * wanted.max())  # of 16 bits


def test_a_product_of_integers_is_no_shape(tmp_path: Path) -> None:
    made = Made()
    row = made.row()
    made.nodes.append(make_node("DynamicQuantizeLinear", [row], ["whole", "scale", "zero"]))
    integers = np.ones((CHANNELS, CHANNELS), np.int8)
    product = made.add("Cast", made.add("MatMulInteger", "whole", integers, "zero"), to=TensorProto.FLOAT)
    both = made.add("Add", row, made.add("Mul", product, "scale"))
    with pytest.raises(BadInput, match="needs the gradient of MatMulInteger"):
        explanations(made.model(made.add("Gemm", both, made.numbers(CHANNELS, CLASSES)), 17), tmp_path)
