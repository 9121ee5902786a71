"""Small ONNX files as other exporters write them."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

SIZE, CLASSES = 16, 5


class Small(nn.Module):
    """Two convolutions, batch normalisation and a classifier; every part that an exporter writes in its own way."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N x 3 x H x W -> N x classes."""
        made: torch.Tensor = self.head(self.features(x).mean((2, 3)))
        return made


def from_torch(path: Path, module: nn.Module | None = None, *, dynamo: bool = True, **options: Any) -> Path:
    """A file as PyTorch writes it, by torch.export or by TorchScript."""
    example = options.pop("example", torch.rand(2, 3, SIZE, SIZE))
    module = (module or Small()).eval()
    if "dynamic" in options:
        axes = options.pop("dynamic")
        key = "dynamic_shapes" if dynamo else "dynamic_axes"
        options[key] = axes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is old in PyTorch, and still written by many
        torch.onnx.export(module, (example,), path, dynamo=dynamo, verbose=False, **options)
    return path


def any_batch(path: Path, module: nn.Module | None = None) -> Path:
    """As `from_torch`, for any number of images."""
    return from_torch(path, module, dynamic=({0: torch.export.Dim("batch", min=1)},), external_data=False)


def by_hand(
    path: Path,
    *,
    layout: str = "NCHW",
    batch: int | str = "N",
    size: Sequence[int | str] = (SIZE, SIZE),
    kind: int = TensorProto.FLOAT,
    opset: int = 17,
    weights_are_inputs: bool = False,
    names: tuple[str, str] = ("data", "prob"),
    output_shape: bool = True,
    change: Callable[[onnx.ModelProto], None] | None = None,
) -> Path:
    """A small graph, as onnx's own hub and converters write such."""
    rng = np.random.default_rng(0)
    source, target = names
    number = helper.tensor_dtype_to_np_dtype(kind if kind != TensorProto.UINT8 else TensorProto.FLOAT)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(0, 0.4, shape).astype(number), name)

    first = source
    nodes = []
    if kind == TensorProto.UINT8:
        nodes += [
            helper.make_node("Cast", [first], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["float", "per_pixel"], ["unit"]),
        ]
        first = "unit"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", [first], ["first"], perm=[0, 3, 1, 2]))
        first = "first"
    nodes += [
        helper.make_node("Conv", [first, "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c1", "scale", "shift", "mean", "var"], ["n1"]),
        helper.make_node("Relu", ["n1"], ["r1"]),
        helper.make_node("Dropout", ["r1"], ["d1", "mask"]),
        helper.make_node("GlobalAveragePool", ["d1"], ["p1"]),
        helper.make_node("Flatten", ["p1"], ["f1"]),
        helper.make_node("Gemm", ["f1", "w2", "b2"], [target], transB=1),
    ]
    constants = [
        weight("w1", 8, 3, 3, 3), weight("b1", 8), weight("scale", 8), weight("shift", 8), weight("mean", 8),
        numpy_helper.from_array(rng.uniform(0.5, 2, 8).astype(number), "var"),
        weight("w2", CLASSES, 8), weight("b2", CLASSES),
    ]  # fmt: skip
    if kind == TensorProto.UINT8:
        constants.append(numpy_helper.from_array(np.array(1 / 255, np.float32), "per_pixel"))
    shape = [batch, 3, *size] if layout == "NCHW" else [batch, *size, 3]
    inputs = [helper.make_tensor_value_info(source, kind, shape)]
    if weights_are_inputs:
        inputs += [helper.make_tensor_value_info(one.name, one.data_type, list(one.dims)) for one in constants]
    made = kind if kind != TensorProto.UINT8 else TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info(target, made, [batch, CLASSES] if output_shape else None)]
    graph = helper.make_graph(nodes, "small", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="by hand")
    model.ir_version = 3 if weights_are_inputs else 8
    if change is not None:
        change(model)
    onnx.save(model, path)
    return path
