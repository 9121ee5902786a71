"""Bias correction: quantized weights and inputs move a layer's mean output, and its bias moves it back.

M. Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, in the
empirical form of its appendix: the means are measured on images instead of derived from batch norm's statistics.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.quantization.layer_data import probed, run


def channel_means(model: onnx.ModelProto, tensors: Sequence[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """The mean of each channel (axis 1) of some tensors over images: name -> float64 [channels]."""
    sums: dict[str, np.ndarray] = {}
    for values in run(model, tensors, images):
        for name, value in zip(tensors, values, strict=True):
            axes = (0, *range(2, value.ndim))
            per_image = value.mean(axis=axes[1:], dtype=np.float64) if value.ndim > 2 else value.astype(np.float64)
            sums[name] = sums.get(name, 0.0) + per_image.sum(axis=0)
    return {name: total / len(images) for name, total in sums.items()}


def correct_bias(
    model: onnx.ModelProto, quantized: onnx.ModelProto, layer: str, images: np.ndarray, wanted: np.ndarray
) -> onnx.ModelProto:
    """Change one layer's bias so that its mean output, quantized, is the float network's.

    Args:
        model: the float graph; it is not changed.
        quantized: what `quantize` made of it.
        layer: first output of a Conv or Gemm with a bias, one of `quantized_layers`.
        images: what the graph's input takes, [n, ...].
        wanted: the layer's mean output in the float network, float64 [channels].

    Returns:
        The float graph with another bias.
    """
    graph, _, output = probed(quantized, layer)
    found = channel_means(graph, [output], images)[output]
    made = onnx.ModelProto()
    made.CopyFrom(model)
    index = Graph(made)
    name = index.producers[layer].input[2]
    bias = index.constant(name).astype(np.float64) + (wanted - found).reshape(index.constant(name).shape)
    index.initializers[name].CopyFrom(numpy_helper.from_array(bias.astype(np.float32), name))
    return made
