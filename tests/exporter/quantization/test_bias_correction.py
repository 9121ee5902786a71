"""Bias correction takes out a shift of the mean, whatever put it there."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from convoynet.exporter.quantization.bias_correction import channel_means, correct_bias
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.layer_data import cut
from convoynet.exporter.quantization.quantize import quantize
from tests.exporter.layer_nets import classifier, conv, drawn, head, images
from tests.exporter.onnx_runs import run


def network() -> onnx.ModelProto:
    weights = drawn(0, one=(16, 3, 3, 3), two=(16, 16, 3, 3), head=(20, 16))
    relus = [helper.make_node("Relu", [name], [f"{name}.relu"]) for name in ("one", "two")]
    return classifier(weights, [conv("input", "one"), relus[0], conv("one.relu", "two"), relus[1], *head("two.relu")])


def shifted(model: onnx.ModelProto, layer: str, by: float) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name == f"{layer}.bias":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(by), tensor.name))
    return made


def test_means_are_those_of_each_channel_whatever_the_batches() -> None:
    model, pictures = network(), images(21)
    means = channel_means(model, ["one", "logits"], pictures)
    np.testing.assert_allclose(means["one"], run(cut(model, ["one"]), pictures).mean(axis=(0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(means["logits"], run(model, pictures).mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("layer", ["one", "two", "logits"])
def test_a_planted_bias_is_removed(target: str, layer: str) -> None:
    model, pictures = network(), images(64)
    ranges = calibrate(model, [pictures], "minmax")
    wrong = shifted(model, "head" if layer == "logits" else layer, 0.5)
    wanted = channel_means(model, [layer], pictures)[layer]

    right = correct_bias(wrong, quantize(wrong, ranges, target), layer, pictures, wanted)

    name = "head.bias" if layer == "logits" else f"{layer}.bias"
    biases = [
        next(numpy_helper.to_array(tensor) for tensor in graph.graph.initializer if tensor.name == name)
        for graph in (model, right, wrong)
    ]
    assert np.abs(biases[1] - biases[0]).max() < 0.05 < np.abs(biases[2] - biases[0]).max()
    exact = run(model, pictures)
    errors = [np.square(run(quantize(graph, ranges, target), pictures) - exact).mean() for graph in (right, wrong)]
    assert errors[0] < errors[1] / 4
