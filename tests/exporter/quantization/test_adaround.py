"""Learned rounding: better than the nearest integers on the layer's output, and found again by `quantize`."""

import numpy as np
import onnx
import pytest
from onnx import helper

from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.quantization.adaround import fan_in, learn_rounding, least_error
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.layer_data import cut, probed, quantized_layers
from convoynet.exporter.quantization.quantize import quantize, quantize_weights, weight_scales
from tests.exporter.layer_nets import classifier, conv, drawn, head, images
from tests.exporter.onnx_runs import run


def network() -> onnx.ModelProto:
    """A strided, a grouped, a dilated convolution, and a fully connected layer."""
    weights = drawn(0, one=(32, 3, 3, 3), two=(32, 16, 3, 3), three=(24, 32, 3, 3), head=(20, 24))
    relus = [helper.make_node("Relu", [name], [f"{name}.relu"]) for name in ("one", "two", "three")]
    return classifier(
        weights,
        [
            conv("input", "one"),
            relus[0],
            conv("one.relu", "two", group=2, strides=[2, 2]),
            relus[1],
            conv("two.relu", "three", pads=2, dilations=[2, 2]),
            relus[2],
            *head("three.relu"),
        ],
    )


def coarse(scales: np.ndarray, weights: np.ndarray, at: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    integers = least_error(weights, scales, at.T @ at / len(at), wanted.T @ at / len(at), 1e-6)
    return np.asarray(integers * scales[:, None])


def test_least_error_beats_the_nearest_integers() -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(4000, 24)) @ random.normal(size=(24, 24))  # correlated, as pixels are
    weights = random.normal(size=(6, 24))
    scales = np.abs(weights).max(axis=1) / 7  # far fewer steps than 127: the choice matters
    nearest = np.rint(weights / scales[:, None]) * scales[:, None]
    found = coarse(scales, weights, inputs, inputs @ weights.T)
    errors = [np.square(inputs @ (rounded - weights).T).mean(axis=0) for rounded in (found, nearest)]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].mean() < errors[1].mean() / 1.8
    largest = np.abs(weights).argmax(axis=1)
    np.testing.assert_allclose(found[np.arange(6), largest], weights[np.arange(6), largest])


def test_weights_that_no_input_reaches_are_rounded_to_the_nearest() -> None:
    weights = np.array([[0.4, -1.27, 0.016]])
    np.testing.assert_array_equal(
        least_error(weights, np.array([0.01]), np.zeros((3, 3)), np.zeros((1, 3)), 1.0), [[40, -127, 2]]
    )


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("layer", ["one", "two", "three", "logits"])
def test_a_layer_comes_nearer_to_its_float_output(layer: str, target: str) -> None:
    model, pictures = network(), images(96)
    fitted, unseen = pictures[:64], pictures[64:]
    ranges = calibrate(model, [pictures], "mse")
    quantized = quantize(model, ranges, target)
    assert quantized_layers(model, quantized) == ["one", "two", "three", "logits"]

    learned = quantize(learn_rounding(model, quantized, layer, fitted, model), ranges, target)

    exact = run(cut(model, [layer]), unseen)
    graphs = [probed(graph, layer) for graph in (learned, quantized)]
    errors = [np.square(run(cut(graph, [output]), unseen) - exact).mean() for graph, _, output in graphs]
    assert errors[0] < errors[1]


def test_quantize_finds_the_chosen_integers_again() -> None:
    model, pictures = network(), images(32)
    ranges = calibrate(model, [pictures], "minmax")
    made = learn_rounding(model, quantize(model, ranges, "gpu"), "two", pictures, model)
    before, after = (Graph(graph).constant("two.weight") for graph in (model, made))
    scales = weight_scales(before)
    np.testing.assert_allclose(weight_scales(after), scales, rtol=1e-6)
    integers = quantize_weights(after, weight_scales(after))
    np.testing.assert_allclose(integers * scales.reshape(-1, 1, 1, 1), after, rtol=1e-5)
    assert (integers != quantize_weights(before, scales)).any()
    assert made == learn_rounding(model, quantize(model, ranges, "gpu"), "two", pictures, model)


def test_fan_in_counts_what_one_output_reads() -> None:
    assert [fan_in(network(), layer) for layer in ("one", "two", "three", "logits")] == [27, 144, 288, 24]
