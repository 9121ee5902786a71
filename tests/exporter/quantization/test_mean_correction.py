"""Moving all biases at once puts the mean of each layer back, by every operator that can, and only where it helps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.progress import Quiet
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.mean_correction import mean_shifts, shift_biases
from convoynet.exporter.quantization.quantize import layers, quantize
from convoynet.exporter.quantization.refine import MEANS, refine
from convoynet.exporter.recipe import Int8
from tests.exporter.layer_nets import Array, classifier, conv, drawn, head
from tests.exporter.onnx_runs import run

TARGETS = ("cpu", "gpu")


def coarse(*shape: int, outputs: int = 0) -> Array:
    """Weights of which all but the largest of each channel are rounded away; `outputs` is the axis of the channels."""
    weights = np.full(shape, 0.4 / 127, np.float32)
    rows = np.moveaxis(weights, outputs, 0)
    rows[(slice(None), *(0,) * (len(shape) - 1))] = 1.0
    return weights


def bright(count: int, channels: int = 16, seed: int = 0) -> Array:
    """Pictures without a dark place: float32 [count, channels, 8, 8] from 0.5 to 1."""
    return np.random.default_rng(seed).uniform(0.5, 1, (count, channels, 8, 8)).astype(np.float32)


def net(
    nodes: Sequence[onnx.NodeProto], stored: dict[str, Any], outputs: Sequence[str] = ("logits",)
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 16, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def one_layer(form: str) -> onnx.ModelProto:
    bias = np.zeros(16, np.float32)
    if form in {"gemm", "gemm without bias"}:
        names = ["flat", "w", "b"][: 2 if "without" in form else 3]
        nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("Gemm", names, ["logits"])]
        return net(nodes, {"w": coarse(1024, 16, outputs=1), "b": bias})
    if form == "matmul":
        nodes = [
            helper.make_node("Transpose", ["input"], ["last"], perm=[0, 2, 3, 1]),
            helper.make_node("MatMul", ["last", "w"], ["made"]),
            helper.make_node("Add", ["b", "made"], ["logits"]),
        ]
        return net(nodes, {"w": coarse(16, 16, outputs=1), "b": bias})
    if form == "transposed":
        node = helper.make_node("ConvTranspose", ["input", "w", "b"], ["logits"], strides=[2, 2])
        return net([node], {"w": coarse(16, 16, 2, 2, outputs=1), "b": bias})
    groups = {"grouped": 2, "depthwise": 16}.get(form, 1)
    names = ["input", "w", "b"][: 2 if "without" in form else 3]
    node = helper.make_node("Conv", names, ["logits"], group=groups, pads=[1] * 4)
    return net([node], {"w": coarse(16, 16 // groups, 3, 3), "b": bias})


FORMS = ("conv", "conv without bias", "grouped", "depthwise", "transposed", "gemm", "gemm without bias", "matmul")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_the_mean_comes_back_whatever_the_operator(form: str, target: str) -> None:
    model, pictures = one_layer(form), bright(24)
    ranges = calibrate(model, [pictures], "minmax")
    quantized = quantize(model, ranges, target)
    assert layers(model, target), form

    moved = shift_biases(model, mean_shifts(model, quantized, pictures))

    axis = 3 if form == "matmul" else 1

    def means(graph: onnx.ModelProto) -> Array:
        found = run(graph, pictures)
        others = tuple(other for other in range(found.ndim) if other != axis)
        return found.mean(axis=others, dtype=np.float64).astype(np.float32)

    exact = means(model)
    off, left = np.abs(means(quantized) - exact), np.abs(means(quantize(moved, ranges, target)) - exact)
    assert off.min() > 0.008
    assert left.max() < off.min() / 20


@pytest.mark.parametrize("target", TARGETS)
def test_the_shift_is_what_rounding_takes_from_weights_and_input(target: str) -> None:
    """Of a 1x1 convolution it is known: (w - w') mean(x) + w' (mean(x) - mean(x'))."""
    weights = coarse(16, 16, 1, 1)
    model = net([conv("input", "logits", pads=0)], {"logits.weight": weights, "logits.bias": np.ones(16, np.float32)})
    pictures = bright(20)
    ranges = {"input": Range(0.0, 0.8)}  # clips, so that the mean of the input moves as well
    stored = quantize(model, ranges, target)

    (shift,) = mean_shifts(model, stored, pictures).values()

    rounded = np.minimum(pictures, 0.8).mean(axis=(0, 2, 3), dtype=np.float64)
    kept = np.where(weights == 1, 1.0, 0.0)[:, :, 0, 0]
    wanted = weights[:, :, 0, 0].astype(np.float64) @ pictures.mean(axis=(0, 2, 3), dtype=np.float64) - kept @ rounded
    np.testing.assert_allclose(shift, wanted, atol=2e-4)
    assert shift.min() > 0.05


def two_layers() -> onnx.ModelProto:
    stored = drawn(1, one=(16, 16, 3, 3), head=(20, 16)) | {"one.weight": coarse(16, 16, 3, 3)}
    nodes = [conv("input", "one"), helper.make_node("Relu", ["one"], ["relu"]), *head("relu")]
    return classifier(stored, nodes, channels=16)


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_kept_where_it_helps_and_the_graph_is_the_same_but_for_numbers(target: str) -> None:
    model, pictures = two_layers(), bright(48)
    ranges = calibrate(model, [pictures], "mse")
    before = model.SerializeToString(deterministic=True)

    found = refine(model, ranges, pictures, Int8(), target, Quiet())

    assert model.SerializeToString(deterministic=True) == before
    (entry,) = found.log
    assert (entry["technique"], entry["kept"]) == (MEANS, True)
    assert entry["sqnr_after"] > entry["sqnr_before"] + 3
    gained = f"{entry['sqnr_before']:.1f} -> {entry['sqnr_after']:.1f} dB"
    assert found.means == f"of {entry['layer']} moved to keep the means: {gained} on 24 images that judge"
    plain, moved = (quantize(graph, ranges, target) for graph in (model, found.model))
    assert moved.graph.node == plain.graph.node
    kinds = [
        [(tensor.name, tensor.data_type, tensor.dims) for tensor in graph.graph.initializer] for graph in (plain, moved)
    ]
    assert kinds[0] == kinds[1]
    if target == "cpu":
        integers = {tensor.data_type for tensor in moved.graph.initializer if tensor.name.endswith(".bias.integers")}
        assert integers == {TensorProto.INT32}


def test_it_is_refused_where_it_hurts() -> None:
    """The images that the means come from are bright and clipped, those that judge are dark."""
    model, pictures = two_layers(), bright(48)
    pictures[1::2] /= 40
    ranges = calibrate(model, [pictures[1::2]], "minmax")

    found = refine(model, ranges, pictures, Int8(), "gpu", Quiet())

    (entry,) = found.log
    assert not entry["kept"]
    assert entry["sqnr_after"] < entry["sqnr_before"] - 3
    assert found.model is model
    assert not found.shifts
    assert "left as they are" in found.means


def test_every_output_has_to_come_nearer() -> None:
    """The logits gain; the other output moves for what only bright images have, and it is dark ones that judge."""
    stored = {
        "logits.weight": coarse(16, 16, 1, 1),
        "edge.weight": np.eye(16, dtype=np.float32).reshape(16, 16, 1, 1),
        "edge.bias": np.full(16, -0.4, np.float32),
        "features.weight": coarse(16, 16, 1, 1),
        **dict.fromkeys(("logits.bias", "features.bias"), np.zeros(16, np.float32)),
    }
    nodes = [
        conv("input", "logits", pads=0),
        conv("input", "edge", pads=0),
        helper.make_node("Relu", ["edge"], ["relu"]),
        conv("relu", "features", pads=0),
    ]
    pictures = bright(48)
    pictures[1::2] *= 0.6  # 0.3 to 0.6: some of it is above the edge, all of it in the range
    for outputs, kept in ((["logits"], True), (["logits", "features"], False)):
        model = net(nodes, stored, outputs)
        ranges = {"input": Range(0.0, 1.0), "relu": Range(0.0, 0.2)}
        found = refine(model, ranges, pictures, Int8(), "gpu", Quiet())
        assert [entry["kept"] for entry in found.log] == [kept]
        assert found.log[0]["sqnr_after"] > found.log[0]["sqnr_before"]


def test_a_bias_that_others_read_stays_theirs() -> None:
    shared = {"bias": np.ones(16, np.float32)}
    stored = {"logits.weight": coarse(16, 16, 1, 1), "other.weight": 2 * coarse(16, 16, 1, 1)}
    nodes = [helper.make_node("Conv", ["input", f"{name}.weight", "bias"], [name]) for name in ("logits", "other")]
    model, pictures = net(nodes, stored | shared, ["logits", "other"]), bright(8)
    shifts = mean_shifts(model, quantize(model, calibrate(model, [pictures], "minmax"), "cpu"), pictures)

    moved = shift_biases(model, shifts)

    biases = {tensor.name: numpy_helper.to_array(tensor) for tensor in moved.graph.initializer}
    for node in moved.graph.node:
        np.testing.assert_allclose(biases[node.input[2]], 1 + shifts[node.output[0]], atol=1e-6)
    assert "bias" not in biases
    one = shift_biases(model, {"other": shifts["other"]})
    assert [node.input[2] for node in one.graph.node] == ["bias", "other.own_bias"]


def test_a_layer_that_stays_in_float_has_its_own_bias_again() -> None:
    model, pictures = two_layers(), bright(48)
    found = refine(model, calibrate(model, [pictures], "mse"), pictures, Int8(), "cpu", Quiet())
    stored = {
        kind: {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
        for kind, graph in (("float", model), ("moved", found.model), ("mixed", found.float_biases(["one"])))
    }
    assert np.abs(stored["moved"]["one.bias"] - stored["float"]["one.bias"]).min() > 0.01
    np.testing.assert_allclose(stored["mixed"]["one.bias"], stored["float"]["one.bias"], atol=1e-6)
    np.testing.assert_array_equal(stored["mixed"]["head.bias"], stored["moved"]["head.bias"])
    assert found.float_biases([]) is found.model


def test_a_network_without_such_layers_is_left_as_it_is() -> None:
    nodes = [helper.make_node("MatMul", ["last", "w"], ["logits"])]
    nodes.insert(0, helper.make_node("Transpose", ["input"], ["last"], perm=[0, 2, 3, 1]))
    model, pictures = net(nodes, {"w": coarse(16, 16, outputs=1)}), bright(8)
    found = refine(model, calibrate(model, [pictures], "mse"), pictures, Int8(), "cpu", Quiet())
    assert found.model is model
    assert found.means == "left as they are: no quantized layer has a bias of its own"
