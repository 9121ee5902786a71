"""Transposed convolutions in INT8: groups, output padding, dilation, depthwise, and the batch norm behind them."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Graph, attribute
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import layers, quantize
from tests.exporter.onnx_runs import operators, run, signal_to_noise_db
from tests.exporter.small_nets import PREPROCESS, pixels, settled

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 4, "stride": 2, "padding": 1},
    "output padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "groups": {"kernel_size": 3, "stride": 2, "groups": 4},
    "depthwise": {"kernel_size": 2, "stride": 2, "groups": 32},
    "dilation": {"kernel_size": 3, "dilation": 2},
    "no bias": {"kernel_size": 2, "stride": 2, "bias": False},
}
# Their output channels differ in size, as batch norms make them.
SPREAD = torch.logspace(-1, 1, 32)


def net(form: dict[str, Any], normed: bool) -> nn.Module:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(32, 32, **form)
    groups = up.groups
    with torch.no_grad():
        up.weight.view(groups, 32 // groups, 32 // groups, -1).mul_(SPREAD.view(groups, 1, -1, 1))
    after = [nn.BatchNorm2d(32)] if normed else []
    first = nn.Conv2d(3, 32, 3, stride=2, padding=1)
    network = nn.Sequential(first, nn.ReLU(), up, *after, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return settled(network, PREPROCESS.normalize(pixels(16)))


@pytest.mark.parametrize("form", FORMS)
def test_a_transposed_convolution_becomes_int8(form: str) -> None:
    model = onnx_from_torch(net(FORMS[form], normed=False), PREPROCESS, uint8_input=True)
    images = pixels(16)
    quantized = quantize(model, calibrate(model, [images], "mse"), "cpu")
    graph = Graph(quantized)
    (node,) = (node for node in graph if node.op_type == "ConvTranspose")
    assert [graph.producer_type(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2
    weights = graph.producers[node.input[1]]
    assert graph.constant(weights.input[0]).dtype == np.int8
    scales, dims = graph.constant(weights.input[1]), graph.initializers[weights.input[0]].dims
    # One for each output channel, as far as the one axis of a DequantizeLinear can tell them apart.
    assert scales.shape == (dims[attribute(weights, "axis", 1)],)
    assert len(scales) == (32 if form != "groups" else 8)
    assert signal_to_noise_db(run(model, images), run(quantized, images)) > 35


@pytest.mark.parametrize("form", FORMS)
def test_the_batch_norm_behind_it_is_folded(form: str) -> None:
    network = net(FORMS[form], normed=True)
    model = onnx_from_torch(network, PREPROCESS, uint8_input=False)
    assert "BatchNormalization" not in operators(model)
    inputs = PREPROCESS.normalize(pixels(4))
    with torch.no_grad():
        expected = network(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(run(model, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("form", "quantized"), [("plain", True), ("groups", False), ("depthwise", False)])
def test_tensorrt_gets_those_without_groups(form: str, quantized: bool) -> None:
    model = onnx_from_torch(net(FORMS[form], normed=False), PREPROCESS, uint8_input=True)
    (name,) = (node.output[0] for node in model.graph.node if node.op_type == "ConvTranspose")
    assert (name in layers(model, "gpu")) == quantized
    assert name not in layers(model, "gpu", "fp8")


def test_a_transposed_convolution_may_be_kept_in_float() -> None:
    model = onnx_from_torch(net(FORMS["plain"], normed=False), PREPROCESS, uint8_input=True)
    (name,) = (node.output[0] for node in model.graph.node if node.op_type == "ConvTranspose")
    quantized = quantize(model, calibrate(model, [pixels(4)], "mse"), "cpu", [name])
    assert not any(tensor.name == f"{name}.weight.integers" for tensor in quantized.graph.initializer)
    onnx.checker.check_model(quantized)
