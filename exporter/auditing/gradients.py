"""Gradients of a published graph: the graph as a PyTorch module, through whose rounding the gradient goes straight."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from convoynet.exporter.auditing.subjects import Subject, logits_name
from convoynet.exporter.errors import BadInput, NoGradient, reason
from convoynet.exporter.graph.onnx_graph import Graph, shapes
from convoynet.exporter.graph.onnx_to_torch import TorchGraph

_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_CONVOLUTIONS = {"Conv", "ConvTranspose"}


def feature_map(subject: Subject) -> str:
    """The last tensor of channels over places that all the way from the image to the logits leads through.

    Raises:
        BadInput: there is none.
    """
    graph = Graph(subject.graph)
    known = shapes(subject.graph)
    logits = logits_name(subject.graph)
    needed = {id(node) for node in _back(graph, logits, "")}
    nodes = [node for node in graph if id(node) in needed]
    behind: set[str] = set()  # tensors that a convolution has made, or that come of one
    for node in nodes:
        if node.op_type in _CONVOLUTIONS or behind.intersection(node.input):
            behind.update(node.output)
    for node in reversed(nodes):
        name = node.output[0]
        places = known.get(name, ())[2:]
        maps = len(places) == 2 and all(places) and places != (1, 1)
        if maps and name in behind and node.op_type != "QuantizeLinear" and _is_cut(graph, logits, name):
            return name
    raise BadInput(
        f"{subject.name} has no feature map: no tensor of channels over places that all of its logits come from, so "
        "that nothing says where it looks"
    )


class Head:
    """What comes behind the feature map: from its values to the logits, with a gradient.

    Raises:
        BadInput: there is no feature map, or an operator behind it has no gradient here.
    """

    def __init__(self, subject: Subject) -> None:
        self.features = feature_map(subject)
        graph = Graph(subject.graph)
        logits = logits_name(subject.graph)
        needed = {id(node) for node in _back(graph, logits, self.features)}
        self._run = _module(subject, [node for node in graph if id(node) in needed], self.features)

    def maps(self, features: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Grad-CAM (R. Selvaraju and others 2017): float64 [n, h, w], for a class of each image; it may be NaN.

        Args:
            features: [n, channels, h, w].
            classes: [n].
        """
        values = torch.tensor(features, dtype=torch.float32).requires_grad_()
        logits = self._run(values)
        picked = logits[torch.arange(len(values)), torch.tensor(classes)].sum()
        (gradient,) = torch.autograd.grad(picked, values)
        weighed = (gradient.mean(dim=(2, 3), keepdim=True) * values).sum(dim=1)
        return torch.relu(weighed).detach().double().numpy()


def whole(subject: Subject) -> TorchGraph:
    """The graph from its input to the logits.

    Raises:
        BadInput: an operator has no gradient here.
    """
    graph = Graph(subject.graph)
    needed = {id(node) for node in _back(graph, logits_name(subject.graph), "")}
    return _module(subject, [node for node in graph if id(node) in needed], graph.inputs[0])


def of_pixels(subject: Subject, module: TorchGraph, pixels: Tensor) -> Tensor:
    """The logits of float pixels, 0..255, [n, h, w, channels]."""
    if subject.takes_pixels:
        logits: Tensor = module(pixels)
        return logits
    mean, std = (
        torch.tensor(values, dtype=torch.float32) for values in (subject.preprocess.mean, subject.preprocess.std)
    )
    made: Tensor = module(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    return made


def _module(subject: Subject, nodes: Iterable[onnx.NodeProto], source: str) -> TorchGraph:
    """Some nodes of a graph as a module that takes the tensor `source`; 16-bit numbers become float32."""
    graph = Graph(subject.graph)
    part = onnx.ModelProto(ir_version=subject.graph.ir_version, opset_import=subject.graph.opset_import)
    part.graph.input.append(helper.make_tensor_value_info(source, TensorProto.FLOAT, None))
    part.graph.output.append(helper.make_tensor_value_info(logits_name(subject.graph), TensorProto.FLOAT, None))
    for node in nodes:
        copied = part.graph.node.add()
        copied.CopyFrom(node)
        for item in copied.attribute:
            if node.op_type == "Cast" and item.name == "to" and item.i in _HALVES:
                item.i = TensorProto.FLOAT
    used = {name for node in part.graph.node for name in node.input}
    for name in used & graph.initializers.keys():
        tensor = graph.initializers[name]
        if tensor.data_type in _HALVES:
            tensor = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name)
        part.graph.initializer.append(tensor)
    try:
        return TorchGraph(part).requires_grad_(False)
    except (BadInput, TypeError) as error:  # TypeError: a type that PyTorch does not take from NumPy
        said = error.node if isinstance(error, NoGradient) else reason(error)
        raise BadInput(f"{subject.name}: its graph has no gradient here: {said}") from error


def _back(graph: Graph, start: str, end: str) -> list[onnx.NodeProto]:
    """The nodes on the ways from `start` back to the inputs, or to the tensor `end`, where the way is over."""
    found: dict[int, onnx.NodeProto] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        node = graph.producers.get(name)
        if name == end or node is None or id(node) in found:
            continue
        found[id(node)] = node
        waiting.extend(node.input)
    return list(found.values())


def _is_cut(graph: Graph, logits: str, name: str) -> bool:
    """Whether nothing comes to the logits but through a tensor."""
    inputs = set(graph.inputs)
    return not any(inputs.intersection(node.input) for node in _back(graph, logits, name))
