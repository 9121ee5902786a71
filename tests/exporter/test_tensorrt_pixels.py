"""Pixels into a TensorRT engine: uint8 NHWC is the network's input, and the normalisation a part of it."""

from __future__ import annotations

import copy

import onnx
import pytest

from exporter.calibrate import calibrate
from exporter.float16 import to_bf16, to_fp16
from exporter.histogram import Range
from exporter.onnx_from_torch import onnx_from_torch
from exporter.quantize import quantize
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")


@pytest.fixture(scope="module")
def exact() -> onnx.ModelProto:
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True, opset=22)


@pytest.fixture(scope="module")
def ranges(exact: onnx.ModelProto) -> dict[str, Range]:
    return calibrate(exact, [pixels(16)], "minmax")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_an_engine_of_each_precision_takes_pixels(
    exact: onnx.ModelProto, ranges: dict[str, Range], precision: str
) -> None:
    model = copy.deepcopy(exact)
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
