"""A few layers as an ONNX graph of their own, to be timed; without PyTorch's exporter, which takes seconds."""

from collections.abc import Sequence
from math import prod
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

_OPSET = 20


def layer_graph(layers: Sequence[nn.Module], input_shape: Sequence[int]) -> onnx.ModelProto:
    """Write layers that follow one another as a graph.

    Args:
        layers: nn.Conv2d, which pads with zeros here, or nn.Linear.
        input_shape: of the first one's input, the batch first; the graph has it fixed.
    """
    # The graph of a network flattens what comes before a matrix product.
    rows = [prod(input_shape[:-1]), input_shape[-1]]
    shape = rows if isinstance(layers[0], nn.Linear) else list(input_shape)
    nodes, constants = [], []
    for index, layer in enumerate(layers):
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        names = [f"tensor{index}", f"weight{index}"]
        constants.append(numpy_helper.from_array(layer.weight.detach().numpy(), names[1]))
        if layer.bias is not None:
            names.append(f"bias{index}")
            constants.append(numpy_helper.from_array(layer.bias.detach().numpy(), names[2]))
        if isinstance(layer, nn.Linear):
            nodes.append(helper.make_node("Gemm", names, [f"tensor{index + 1}"], transB=1))
        else:
            nodes.append(helper.make_node("Conv", names, [f"tensor{index + 1}"], **_attributes(layer)))
    first = helper.make_tensor_value_info("tensor0", TensorProto.FLOAT, shape)
    last = helper.make_tensor_value_info(f"tensor{len(layers)}", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "layers", [first], [last], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)


def _attributes(layer: nn.Conv2d) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "kernel_shape": list(layer.kernel_size),
        "strides": list(layer.stride),
        "dilations": list(layer.dilation),
        "group": layer.groups,
    }
    if layer.padding == "same":
        return attributes | {"auto_pad": "SAME_UPPER"}
    if not isinstance(layer.padding, str):
        attributes["pads"] = [*layer.padding, *layer.padding]
    return attributes
