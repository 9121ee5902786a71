"""Grad-CAM of a float graph in PyTorch, by autograd: what the nodes of `grad_cam` are held against."""

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from convoynet.exporter.explaining.feature_map import head_of
from convoynet.exporter.graph.onnx_from_torch import OUTPUT_NAME
from convoynet.exporter.graph.onnx_graph import Edge
from convoynet.exporter.graph.onnx_to_torch import TorchGraph

Array = npt.NDArray[np.float32]


def reference_maps(
    model: onnx.ModelProto, inputs: npt.NDArray[np.generic], classes: npt.NDArray[np.int64], output: str = OUTPUT_NAME
) -> Array:
    """The explanations of images, [batch, height, width].

    Args:
        model: a float graph without an explanation.
        inputs: what it takes.
        classes: which class is explained, one for each image.
        output: its output of scores.

    Raises:
        BadInput: it has no map of features, or an operator that PyTorch's stand-in for it lacks.
    """
    head = head_of(model, output)

    def begin(edge: Edge, value: Tensor) -> Tensor:
        return value.requires_grad_() if edge.tensor == head.features else value

    graph = TorchGraph(model, [head.features, head.score], begin).requires_grad_(False)
    features, scores = graph.run(torch.from_numpy(inputs))
    chosen = scores.reshape(len(inputs), -1)[torch.arange(len(inputs)), torch.from_numpy(classes)]
    (gradient,) = torch.autograd.grad(chosen.sum(), features)
    with torch.no_grad():
        maps: Array = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu().numpy()
    return maps
