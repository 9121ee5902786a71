"""Cross-layer equalization: what it may touch, and that the network computes the same."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from convoynet.exporter.quantization.equalize import chains, equalize
from tests.exporter.layer_nets import classifier, conv, drawn, head, images
from tests.exporter.onnx_runs import run


def uneven(weights: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    """Output channels from a hundredth to a hundred times as large."""
    for name in names:
        factors = np.logspace(-2, 2, len(weights[f"{name}.weight"])).astype(np.float32)
        weights[f"{name}.weight"] *= factors.reshape(-1, 1, 1, 1)
        weights[f"{name}.bias"] *= factors
    return weights


def stored(model: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)


def same(model: onnx.ModelProto, other: onnx.ModelProto) -> None:
    expected, found = run(model, images(5)), run(other, images(5))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_two_convolutions_get_like_channels_and_compute_the_same() -> None:
    weights = uneven(drawn(0, one=(8, 3, 3, 3), two=(6, 8, 3, 3), head=(10, 6)), "one")
    nodes = [conv("input", "one"), helper.make_node("Relu", ["one"], ["between"]), conv("between", "two"), *head("two")]
    model = classifier(weights, nodes)
    (chain,) = chains(model)
    assert chain.layers == ("one", "two")
    assert chain.between == ("one", "between")

    made = equalize(model)

    same(model, made)
    first = np.abs(stored(made, "one.weight")).max(axis=(1, 2, 3))
    second = np.abs(stored(made, "two.weight")).max(axis=(0, 2, 3))
    np.testing.assert_allclose(first, second, rtol=1e-5)
    before = np.abs(weights["one.weight"]).max(axis=(1, 2, 3)) * np.abs(weights["two.weight"]).max(axis=(0, 2, 3))
    np.testing.assert_allclose(first * second, before, rtol=1e-5)


@pytest.mark.parametrize("groups", [2, 8])
def test_grouped_and_depthwise_chains_settle(groups: int) -> None:
    weights = uneven(
        drawn(1, one=(8, 3, 1, 1), mid=(16, 8 // groups, 3, 3), two=(6, 16, 1, 1), head=(10, 6)), "one", "mid"
    )
    nodes = [
        conv("input", "one", pads=0),
        helper.make_node("LeakyRelu", ["one"], ["a"], alpha=0.1),
        conv("a", "mid", group=groups),
        helper.make_node("MaxPool", ["mid"], ["b"], kernel_shape=[2, 2], strides=[2, 2]),
        conv("b", "two", pads=0),
        *head("two"),
    ]
    model = classifier(weights, nodes)
    assert [chain.layers for chain in chains(model)] == [("one", "mid", "two")]

    made = equalize(model)

    same(model, made)
    for left, right in (("one", "mid"), ("mid", "two")):
        made_by = np.abs(stored(made, f"{left}.weight")).max(axis=(1, 2, 3))
        read = stored(made, f"{right}.weight")
        read_by_group = np.abs(read.reshape(groups if right == "mid" else 1, -1, *read.shape[1:])).max(axis=(1, 3, 4))
        np.testing.assert_allclose(made_by, read_by_group.ravel(), rtol=1e-3)


def test_fully_connected_layers_are_equalized() -> None:
    weights = drawn(2, one=(12, 3), two=(10, 12))
    weights["one.weight"] *= np.logspace(-1, 1, 12, dtype=np.float32)[:, None]
    weights["two.weight"] = np.ascontiguousarray(weights["two.weight"].T)
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "one.weight", "one.bias"], ["one"], transB=1),
        helper.make_node("Relu", ["one"], ["between"]),
        helper.make_node("Gemm", ["between", "two.weight", "two.bias"], ["logits"]),
    ]
    model = classifier(weights, nodes)
    made = equalize(model)
    same(model, made)
    np.testing.assert_allclose(
        np.abs(stored(made, "one.weight")).max(axis=1), np.abs(stored(made, "two.weight")).max(axis=1), rtol=1e-5
    )


def test_dead_channels_stay() -> None:
    weights = drawn(3, one=(8, 3, 3, 3), two=(6, 8, 3, 3), head=(10, 6))
    weights["one.weight"][2] = 0
    weights["two.weight"][:, 5] = 0
    made = equalize(classifier(weights, [conv("input", "one"), conv("one", "two"), *head("two")]))
    for channel in (2, 5):
        np.testing.assert_array_equal(stored(made, "one.weight")[channel], weights["one.weight"][channel])
        np.testing.assert_array_equal(stored(made, "two.weight")[:, channel], weights["two.weight"][:, channel])
    assert np.isfinite(run(made, images(2))).all()


@pytest.mark.parametrize("between", ["relu6", "sigmoid", "residual", "shared weights"])
def test_what_is_not_exact_is_left_alone(between: str) -> None:
    weights = drawn(4, one=(8, 3, 3, 3), two=(8, 8, 3, 3), three=(8, 8, 3, 3), head=(10, 8))
    weights |= {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    second = conv("between", "two")
    nodes = {
        "relu6": [helper.make_node("Clip", ["one", "zero", "six"], ["between"]), second],
        "sigmoid": [helper.make_node("Sigmoid", ["one"], ["between"]), second],
        "residual": [
            helper.make_node("Relu", ["one"], ["between"]),
            second,
            helper.make_node("Add", ["two", "between"], ["sum"]),
        ],
        "shared weights": [
            conv("one", "two"),
            helper.make_node("Conv", ["two", "two.weight"], ["sum"], pads=[1] * 4),
        ],
    }[between]
    model = classifier(weights, [conv("input", "one"), *nodes, *head(nodes[-1].output[0])])
    assert chains(model) == []
    assert equalize(model) == model
