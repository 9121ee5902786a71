"""A Q/DQ graph with the meaning that TensorRT gives it, to be run where there is no TensorRT.

TensorRT has no UINT8 activations: it takes a UINT8 zero point of 0 for INT8, and what was above 127 is cut off, without
a word. A zero point that is not 0 it refuses.
"""

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_graph import Graph

_PAIR = ("QuantizeLinear", "DequantizeLinear")


def as_tensorrt_reads(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph in which every UINT8 of a Q/DQ pair is the INT8 that TensorRT takes it for.

    Raises:
        BadInput: a zero point that is not 0, for which TensorRT has no reading.
    """
    read = onnx.ModelProto()
    read.CopyFrom(model)
    graph = Graph(read)
    zero_points = {node.input[2] for node in graph if node.op_type in _PAIR and len(node.input) > 2}
    quantized = {node.output[0] for node in graph if node.op_type == "QuantizeLinear"}
    for name in sorted(zero_points & graph.initializers.keys()):
        value = graph.constant(name)
        if value.astype(np.float32).any():
            raise BadInput(f"zero point {name!r} is not 0: TensorRT refuses it; export with --target gpu")
        if value.dtype == np.uint8:
            graph.initializers[name].CopyFrom(numpy_helper.from_array(value.astype(np.int8), name))
    for item in read.graph.value_info:
        if item.name in quantized and item.type.tensor_type.elem_type == TensorProto.UINT8:
            item.type.tensor_type.elem_type = TensorProto.INT8
    return read
