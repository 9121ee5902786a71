"""A float ONNX graph as a PyTorch module that can be trained, and back into the graph.

The weights keep the names that they have in the graph, so that what was learnt goes back where it came from. Nothing
is traced or generated: the module runs the graph's nodes one after another.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_given import opset_of
from convoynet.exporter.graph.onnx_graph import Edge, Graph, before
from convoynet.exporter.graph.onnx_operators import operation

# (a reading of a tensor by a node, the tensor) -> what the node reads instead
Reading = Callable[[Edge, Tensor], Tensor]

# Operators whose constants are weights: the inputs that are.
_TRAINED = {"Conv": (1, 2), "Gemm": (1, 2), "MatMul": (0, 1), "BatchNormalization": (1, 2)}


class TorchGraph(nn.Module):
    """Computes what a float ONNX graph computes.

    The constants of Conv, Gemm, MatMul and the scales and biases of BatchNormalization are parameters; other floats are
    buffers, batch statistics among them. Integers are shapes and axes, and stay on the CPU. There is no training mode:
    batch norms use the statistics of the graph.

    Args:
        model: a float graph with one input; it is not changed, and weights are copied.
        outputs: what `forward` returns: tensors of the graph, inner ones too; None for the first output of the graph.
        reading: called with each activation and weight that a node reads, in float32; None to read as it is.

    Raises:
        BadInput: an operator that is needed for the outputs has no counterpart here; the message names it.
    """

    def __init__(
        self, model: onnx.ModelProto, outputs: Sequence[str] | None = None, reading: Reading | None = None
    ) -> None:
        super().__init__()
        graph = Graph(model)
        self.wanted = list(outputs) if outputs is not None else graph.outputs[:1]
        self.reading = reading
        (self.input_name,) = graph.inputs
        nodes = _needed(graph, self.wanted)
        opset = opset_of(model)
        self._steps = [(operation(node, opset), list(node.input), list(node.output)) for node in nodes]
        self._slots: dict[str, str] = {}
        self._integers: dict[str, Tensor] = {}
        trained = _trained(graph, nodes)
        for name in dict.fromkeys(name for node in nodes for name in node.input if graph.is_constant(name)):
            # A copy: the array is a view of the graph's bytes.
            value = torch.from_numpy(graph.constant(name).copy())
            if not value.is_floating_point():
                self._integers[name] = value
                continue
            slot = self._slots[name] = f"constant_{len(self._slots)}"
            if name in trained:
                self.register_parameter(slot, nn.Parameter(value))
            else:
                self.register_buffer(slot, value)
        self._last = last_readings(self._steps, self.wanted)

    def initializer(self, name: str) -> Tensor:
        """A constant of the graph, by its name there: a parameter, a buffer or integers."""
        value: Tensor = self._integers[name] if name in self._integers else getattr(self, self._slots[name])
        return value

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in the graph."""
        parameters = dict(self.named_parameters(recurse=False))
        return {name: parameters[slot] for name, slot in self._slots.items() if slot in parameters}

    def forward(self, x: Tensor) -> Any:
        """The graph's input -> the wanted tensor, or a tuple of them where several are wanted."""
        made = self.run(x)
        return made[0] if len(made) == 1 else tuple(made)

    def run(self, x: Tensor) -> list[Tensor]:
        """The graph's input -> the wanted tensors."""
        values: dict[str, Tensor] = {self.input_name: x}
        for step, (run, inputs, outputs) in enumerate(self._steps):
            given = [self._read(values, name, outputs[0], index) for index, name in enumerate(inputs)]
            made = run(*given)
            values.update(zip(outputs, made if isinstance(made, tuple) else (made,), strict=False))
            for name in self._last.get(step, ()):  # memory that the backward pass does not need is free again
                values.pop(name, None)
        return [values[name] if name in values else self.initializer(name) for name in self.wanted]

    def _read(self, values: dict[str, Tensor], name: str, reader: str, index: int) -> Tensor | None:
        if not name:
            return None
        value = values[name] if name in values else self.initializer(name)
        if self.reading is None or value.dtype != torch.float32:
            return value
        return self.reading(Edge(name, reader, index), value)

    def write_into(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the graph that this was made from, with the parameters as they are now."""
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        trained = self.trained()
        for tensor in changed.graph.initializer:
            if tensor.name in trained:
                value = trained[tensor.name].detach().cpu().contiguous().numpy()
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        return changed


def _needed(graph: Graph, wanted: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that the wanted tensors depend on, in the order of the graph."""
    missing = [name for name in wanted if name not in graph.producers and name not in graph.inputs]
    if missing:
        raise BadInput(f"the graph computes no tensor {missing[0]!r}")
    return before(graph, wanted)


def _trained(graph: Graph, nodes: Iterable[onnx.NodeProto]) -> set[str]:
    floats = {name for name, tensor in graph.initializers.items() if tensor.data_type == onnx.TensorProto.FLOAT}
    return {
        node.input[index]
        for node in nodes
        for index in _TRAINED.get(node.op_type, ())
        if index < len(node.input) and node.input[index] in floats
    }


def last_readings(
    steps: Sequence[tuple[Any, Sequence[str], Sequence[str]]], wanted: Sequence[str]
) -> dict[int, list[str]]:
    """Step -> the tensors that no later one reads."""
    last: dict[str, int] = {}
    for index, (_, inputs, outputs) in enumerate(steps):
        last.update(dict.fromkeys((*inputs, *outputs), index))
    freed: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in wanted:
            freed.setdefault(index, []).append(name)
    return freed
