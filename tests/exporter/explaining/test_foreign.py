"""Explanations for the graphs of other exporters: older operators, constants as nodes, heads that are written oddly."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.helper import make_node

from convoynet.exporter.errors import BadInput, Refused
from convoynet.exporter.explaining.reference import reference_maps
from convoynet.exporter.publishing.explained_model import explain_file
from tests.exporter.onnx_runs import session_of

Array = NDArray[np.float32]
CHANNELS, CLASSES, SIDE = 5, 3, 4
RANDOM = np.random.default_rng(0)
TRUNK = [make_node("Conv", ["image", "kernel"], ["map"], kernel_shape=[3, 3]), make_node("Relu", ["map"], ["features"])]
IMAGES = RANDOM.standard_normal((4, 1, SIDE + 2, SIDE + 2)).astype(np.float32)


def numbers(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def stored(name: str, values: object) -> NodeProto:
    return make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(values)))


def network(
    nodes: Sequence[NodeProto], constants: dict[str, NDArray[np.generic]], opset: int = 20, ir: int = 8
) -> onnx.ModelProto:
    kept = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    images = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", *IMAGES.shape[1:]])]
    if ir < 4:  # such files have their weights among the inputs
        images += [helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in kept]
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", CLASSES])
    graph = helper.make_graph(nodes, "net", images, [scores], kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def explanations(model: onnx.ModelProto, folder: Path) -> tuple[Array, Array]:
    """The scores and the maps of the images, of a file that got the output."""
    file = folder / "net.onnx"
    onnx.save(model, file)
    made, _ = explain_file(file)
    session = session_of(made)
    scores, maps = session.run(["scores", "explanation"], {"image": IMAGES})
    return scores, maps


@pytest.mark.parametrize(("opset", "ir"), [(11, 3), (11, 6), (12, 7), (13, 7), (17, 8), (20, 9)])
def test_every_opset_with_a_shape_that_the_graph_computes(opset: int, ir: int, tmp_path: Path) -> None:
    axes = {"axes": [0]} if opset < 13 else {}
    nodes = [
        *TRUNK,
        make_node("Shape", ["features"], ["shape"]),
        stored("first", np.array(0)),
        stored("rest", np.array([-1])),
        make_node("Gather", ["shape", "first"], ["batch"], axis=0),
        stored("zero", np.array([0])),
        make_node("Unsqueeze", ["batch"] if axes else ["batch", "zero"], ["rows"], **axes),
        make_node("Concat", ["rows", "rest"], ["size"], axis=0),
        make_node("Reshape", ["features", "size"], ["row"]),
        make_node("Gemm", ["row", "weights"], ["raw"], transB=1),
        make_node("Softmax", ["raw"], ["scores"], axis=1),
    ]
    constants = {"kernel": numbers(CHANNELS, 1, 3, 3), "weights": numbers(CLASSES, CHANNELS * SIDE * SIDE)}
    scores, maps = explanations(network(nodes, constants, opset, ir), tmp_path)

    windows = np.lib.stride_tricks.sliding_window_view(IMAGES[:, 0], (3, 3), (1, 2))
    features = np.maximum(np.einsum("nhwij,cij->nchw", windows, constants["kernel"][:, 0]), 0)
    mean = constants["weights"].reshape(CLASSES, CHANNELS, SIDE, SIDE).mean((2, 3))
    wanted = np.maximum(np.einsum("nchw,nc->nhw", features, mean[scores.argmax(1)]), 0)
    np.testing.assert_allclose(maps, wanted, atol=1e-4 * wanted.max())


@pytest.mark.parametrize("bound", [0.0, 0.3, np.finfo(np.float32).min])
def test_a_max_between_the_map_and_its_layer_cuts_off(bound: float, tmp_path: Path) -> None:
    nodes = [
        TRUNK[0],
        make_node("Flatten", ["map"], ["flat"]),
        make_node("Max", ["flat", "bound"], ["row"]),
        make_node("Gemm", ["row", "weights"], ["scores"]),
    ]
    constants: dict[str, NDArray[np.generic]] = {
        "kernel": numbers(CHANNELS, 1, 3, 3),
        "weights": numbers(CHANNELS * SIDE * SIDE, CLASSES),
        "bound": np.array([bound], np.float32),
    }
    scores, maps = explanations(network(nodes, constants), tmp_path)
    # In numbers: the gradient of the winning score where the bound is below, averaged over the places.
    windows = np.lib.stride_tricks.sliding_window_view(IMAGES[:, 0], (3, 3), (1, 2))
    features = np.einsum("nhwij,cij->nchw", windows, constants["kernel"][:, 0])
    rows = constants["weights"].T.reshape(CLASSES, CHANNELS, SIDE, SIDE)[scores.argmax(1)]
    wanted = np.maximum(((rows * (features > bound)).mean((2, 3), keepdims=True) * features).sum(1), 0)
    np.testing.assert_allclose(maps, wanted, atol=1e-4 * wanted.max())


@pytest.mark.parametrize("pads", [{"auto_pad": "SAME_UPPER"}, {"pads": [1, 1, 1, 1]}, {"ceil_mode": 1}])
def test_a_mean_over_the_edge_of_the_map_is_not_taken_for_one_of_the_map(
    pads: dict[str, object], tmp_path: Path
) -> None:
    kernel = [6, 6] if "ceil_mode" not in pads else [4, 4]
    nodes = [
        *TRUNK,
        make_node(
            "AveragePool", ["features"], ["mean"], kernel_shape=kernel, strides=[6, 6], count_include_pad=1, **pads
        ),
        make_node("Flatten", ["mean"], ["row"]),
        make_node("Gemm", ["row", "weights"], ["scores"]),
    ]
    constants = {"kernel": numbers(CHANNELS, 1, 3, 3), "weights": numbers(CHANNELS, CLASSES)}
    with pytest.raises(BadInput, match="needs the gradient of AveragePool"):
        explanations(network(nodes, constants), tmp_path)


def pooled(**constants: NDArray[np.generic]) -> tuple[list[NodeProto], dict[str, NDArray[np.generic]]]:
    nodes = [
        *TRUNK,
        make_node("GlobalAveragePool", ["features"], ["mean"]),
        make_node("Flatten", ["mean"], ["row"]),
        make_node("Gemm", ["row", "weights"], ["scores"]),
    ]
    return nodes, {"kernel": numbers(CHANNELS, 1, 3, 3), "weights": numbers(CHANNELS, CLASSES), **constants}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("old", "of opset 10, and the output 'explanation' needs 11"),
        ("inside", "has a tensor 'explanation.relu_1'"),
        ("no number", "are no numbers"),
        ("two inputs", r"has 2 inputs \(image, other\)"),
    ],
)
def test_what_cannot_be_had_names_the_reason(change: str, reason: str, tmp_path: Path) -> None:
    nodes, constants = pooled()
    if change == "no number":
        constants["weights"] = np.full_like(constants["weights"], np.nan)
    if change == "old":
        nodes[-1].input.append("bias")
        constants["bias"] = numbers(CLASSES)
    model = network(nodes, constants, 10 if change == "old" else 20)
    if change == "inside":
        for names in [*(node.input for node in model.graph.node), *(node.output for node in model.graph.node)]:
            names[:] = ["explanation.relu_1" if name == "features" else name for name in names]
    if change == "two inputs":
        model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", CLASSES]))
    with pytest.raises((BadInput, Refused), match=reason):
        explanations(model, tmp_path)


def test_the_first_output_may_be_another(tmp_path: Path) -> None:
    nodes, constants = pooled()
    model = network(nodes, constants)
    model.graph.node.append(make_node("ReduceMax", ["scores"], ["largest"], keepdims=0))
    model.graph.output.insert(0, helper.make_tensor_value_info("largest", TensorProto.FLOAT, []))
    onnx.save(model, tmp_path / "net.onnx")
    made, _ = explain_file(tmp_path / "net.onnx", "scores")
    session = session_of(made)
    scores, maps = session.run(["scores", "explanation"], {"image": IMAGES})
    wanted = reference_maps(model, IMAGES, scores.argmax(1), "scores")
    np.testing.assert_allclose(maps, wanted, atol=1e-4 * wanted.max())


def test_a_layer_over_rows_of_the_map(tmp_path: Path) -> None:
    nodes = [
        *TRUNK,
        stored("height", np.array([2])),
        make_node("ReduceMean", ["features", "height"], ["columns"], keepdims=0),
        make_node("Conv", ["columns", "across"], ["lines"], kernel_shape=[3], pads=[1, 1]),
        make_node("GlobalAveragePool", ["lines"], ["pooled"]),
        make_node("Flatten", ["pooled"], ["row"]),
        make_node("Gemm", ["row", "weights"], ["scores"], transB=1),
    ]
    kernel, across, weights = numbers(CHANNELS, 1, 3, 3), numbers(7, CHANNELS, 3), numbers(CLASSES, 7)
    constants = {"kernel": kernel, "across": across, "weights": weights}
    scores, maps = explanations(network(nodes, constants), tmp_path)
    windows = np.lib.stride_tricks.sliding_window_view(IMAGES[:, 0], (3, 3), (1, 2))
    features = np.maximum(np.einsum("nhwij,cij->nchw", windows, kernel[:, 0]), 0)
    # A column at the edge is seen by two of the three taps.
    taps = across.sum(2) * SIDE - across[:, :, 0] - across[:, :, 2]
    wanted = np.maximum(np.einsum("nchw,nc->nhw", features, weights[scores.argmax(1)] @ taps / SIDE**3), 0)
    np.testing.assert_allclose(maps, wanted, atol=1e-4 * wanted.max())


def branch(operator: str, name: str) -> onnx.GraphProto:
    result = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", CHANNELS, 1, 1])
    return helper.make_graph([make_node(operator, ["features"], [name])], name, [], [result])


@pytest.mark.parametrize("beside", [True, False])
def test_what_a_branch_reads_of_the_map_is_not_left_out(beside: bool, tmp_path: Path) -> None:
    nodes = [
        *TRUNK,
        make_node("Shape", ["features"], ["shape"]),
        make_node("Gather", ["shape", "axis"], ["channels"]),
        make_node("Equal", ["channels", "five"], ["largest"]),
        make_node(
            "If",
            ["largest"],
            ["chosen"],
            then_branch=branch("GlobalMaxPool", "largest_of"),
            else_branch=branch("GlobalAveragePool", "mean_of"),
        ),
        make_node("GlobalAveragePool", ["features"], ["mean"]),
        make_node("Add", ["chosen", "mean"] if beside else ["chosen", "zero"], ["both"]),
        make_node("Flatten", ["both"], ["row"]),
        make_node("Gemm", ["row", "weights"], ["scores"], transB=1),
    ]
    constants: dict[str, NDArray[np.generic]] = {
        "kernel": numbers(CHANNELS, 1, 3, 3), "weights": numbers(CLASSES, CHANNELS), "axis": np.array(1),
        "five": np.array(CHANNELS), "zero": np.zeros(1, np.float32),
    }  # fmt: skip
    with pytest.raises(BadInput, match=r"needs the gradient of If \('chosen'\)"):
        explanations(network(nodes, constants), tmp_path)


def test_scores_that_only_compare_have_no_evidence(tmp_path: Path) -> None:
    nodes = [
        *TRUNK,
        make_node("GlobalAveragePool", ["features"], ["mean"]),
        make_node("Flatten", ["mean"], ["row"]),
        make_node("Greater", ["row", "half"], ["above"]),
        make_node("Cast", ["above"], ["counted"], to=TensorProto.FLOAT),
        make_node("Gemm", ["counted", "weights"], ["scores"], transB=1),
    ]
    constants = {"kernel": numbers(CHANNELS, 1, 3, 3), "weights": numbers(CLASSES, CHANNELS), "half": numbers(1)}
    with pytest.raises(BadInput, match="have no gradient at the map of features 'features'"):
        explanations(network(nodes, constants), tmp_path)
