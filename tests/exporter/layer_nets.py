"""Small graphs with logits, for the refinements of quantization."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.float32]


def classifier(weights: dict[str, Array], nodes: list[onnx.NodeProto], channels: int = 3) -> onnx.ModelProto:
    """A graph from "input" [batch, channels, 8, 8] to "logits"."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", channels, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )


def head(tensor: str) -> list[onnx.NodeProto]:
    """Average over the pixels, and a fully connected layer of "head.weight" and "head.bias"."""
    return [
        helper.make_node("GlobalAveragePool", [tensor], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["logits"], transB=1),
    ]


def conv(source: str, name: str, *, pads: int = 1, **attributes: object) -> onnx.NodeProto:
    """A convolution by `name`.weight and `name`.bias, which makes the tensor `name`."""
    inputs = [source, f"{name}.weight", f"{name}.bias"]
    return helper.make_node("Conv", inputs, [name], pads=[pads] * 4, **attributes)


def drawn(seed: int, **shapes: tuple[int, ...]) -> dict[str, Array]:
    """Normal weights and biases: `name` -> `name`.weight of that shape over the root of its fan-in, `name`.bias."""
    random = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for name, shape in shapes.items():
        made[f"{name}.weight"] = (random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        made[f"{name}.bias"] = random.normal(size=shape[0]).astype(np.float32) * np.float32(0.1)
    return made


def images(count: int, seed: int = 0, channels: int = 3) -> Array:
    """Smooth noise, as pictures are: float32 [count, channels, 8, 8]."""
    noise = np.random.default_rng(seed).normal(size=(count, channels, 8, 8))
    smooth = sum(np.roll(noise, (down, right), (2, 3)) for down in range(3) for right in range(3))
    return (smooth / 3).astype(np.float32)
