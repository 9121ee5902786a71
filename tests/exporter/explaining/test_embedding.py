"""What classifiers make their scores of: the last layer, applied to it, gives the scores."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from torch import Tensor, nn

from convoynet.exporter.errors import BadInput
from convoynet.exporter.explaining.embedding import with_features
from convoynet.exporter.explaining.grad_cam import explained
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.float16 import to_fp16
from convoynet.exporter.quantization.quantize import quantize
from tests.exporter.explaining.test_grad_cam import (
    CHANNELS,
    CLASSES,
    HEADS,
    agree,
    error,
    exported,
    flat,
    in_openvino,
    ran,
)
from tests.exporter.explaining.test_zoo import last_layer, read_by
from tests.exporter.small_nets import PREPROCESS, pixels

ROUNDING = 1e-4


@pytest.mark.parametrize("name", [name for name in HEADS if name != "distances"])
def test_features_are_what_the_last_layer_reads(name: str) -> None:
    model, graph = exported(name)
    before = graph.SerializeToString()
    made = with_features(explained(graph))
    assert graph.SerializeToString() == before
    for count in (1, 5):
        inputs = PREPROCESS.normalize(pixels(count))
        found = ran(made, inputs)
        assert found["features"].dtype == np.float32
        assert error(found["features"], read_by(model, last_layer(model), inputs)) < ROUNDING
        assert np.array_equal(found["logits"], ran(graph, inputs)["logits"])
        assert np.array_equal(found["explanation"], ran(explained(graph), inputs)["explanation"])


def test_codes_are_a_layer_that_distances_are_measured_to() -> None:
    """As LeNet-5 has them."""
    model, graph = exported("distances")
    inputs = PREPROCESS.normalize(pixels(5))
    found = ran(with_features(graph), inputs)
    codes = model.head.codes.detach().numpy()
    wanted = -((found["features"][:, None] - codes) ** 2).sum(2)
    assert found["features"].shape == (5, CHANNELS)
    np.testing.assert_allclose(found["logits"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["a pool and a layer", "layers, as VGG's", "maps of classes, as NIN's"])
def test_a_quantized_graph_has_features_and_keeps_its_answers(name: str, target: str) -> None:
    _, graph = exported(name)
    inputs = PREPROCESS.normalize(pixels(8))
    quantized = quantize(graph, calibrate(graph, [inputs], "minmax"), target)
    made = with_features(quantized)
    count = len(quantized.graph.node)
    assert list(made.graph.node)[:count] == list(quantized.graph.node)
    found, exact = ran(made, inputs), ran(with_features(graph), inputs)
    assert np.array_equal(found["logits"], ran(quantized, inputs)["logits"])
    assert np.corrcoef(found["features"].ravel(), exact["features"].ravel())[0, 1] > 0.99
    if target == "cpu":
        both = in_openvino(made)(inputs)
        assert np.array_equal(both["logits"], in_openvino(quantized)(inputs)["logits"])
        assert agree(both, found, "features", 0.05)


def test_half_precision_has_features_in_float() -> None:
    _, graph = exported("a pool and a layer")
    inputs = PREPROCESS.normalize(pixels(4))
    found = ran(with_features(to_fp16(graph, {})), inputs)
    assert found["features"].dtype == np.float32
    assert error(found["features"], ran(with_features(graph), inputs)["features"]) < 0.01


class Branches(nn.Module):
    """Scores that are the sum of two layers'."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5)
        self.of_one, self.of_other = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.of_one(self.one(x).mean((2, 3))) + self.of_other(self.other(x).mean((2, 3)))
        return result


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (flat(nn.Linear(3 * 32 * 32, CLASSES)), "reads the image itself: the network has no features"),
        (Branches(), "the scores are made by Add .*, and features are what one last layer of weights reads"),
    ],
    ids=["one layer", "two layers side by side"],
)
def test_what_has_no_features_is_told_in_one_line(model: nn.Module, reason: str) -> None:
    graph = onnx_from_torch(model, PREPROCESS, uint8_input=False)
    with pytest.raises(BadInput, match=reason) as refused:
        with_features(graph)
    assert "\n" not in str(refused.value)


def test_features_are_added_once_and_their_name_is_free() -> None:
    _, graph = exported("a pool and a layer")
    made = with_features(graph)
    with pytest.raises(BadInput, match="has an output 'features' already"):
        with_features(made)
    taken = onnx.ModelProto()
    taken.CopyFrom(graph)
    taken.graph.initializer[0].name = "features"
    with pytest.raises(BadInput, match="has a tensor 'features', and what makes the output 'features' is called so"):
        with_features(taken)
