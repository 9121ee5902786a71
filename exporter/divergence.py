"""Where a graph and the one that it was made from part: the error of each tensor that both compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from matplotlib.figure import Figure
from onnx import TensorProto

from exporter.onnx_graph import Graph
from exporter.runtime import Array, inner_session

# Below this a tensor has parted from the other graph's: noise of a tenth of its size.
THRESHOLD_DB = 20.0
# What a tensor without any error is given: float32 itself is good for about 150 dB.
EXACT_DB = 200.0
_COMPUTING = frozenset({"Conv", "Gemm", "MatMul", "Add", "Concat", "Mul", "BatchNormalization", "LRN", "ConvTranspose"})


@dataclass(frozen=True)
class TensorError:
    """One tensor: its name, the operator that makes it, and its signal-to-noise ratio in decibels."""

    tensor: str
    operator: str
    sqnr_db: float


def divergence(exact: onnx.ModelProto, changed: onnx.ModelProto, images: Array) -> list[TensorError]:
    """Compare what two graphs compute on the way, in the order of the graph.

    Args:
        exact: a float graph.
        changed: one made from it, in which tensors of the same name mean the same, as `quantize` keeps it.
        images: what both take as their input, a few of them; they are run one at a time.

    Returns:
        The results of the operators that compute, and of what follows them into one kernel, that both graphs have.
    """
    graph, other = Graph(exact), Graph(changed)
    tensors = [
        node.output[0]
        for node in graph
        if _computes(graph, node) and node.output[0] in other.producers and _is_float(other, node.output[0])
    ]
    if not tensors:
        return []
    # What the readers get: a ReLU may have gone into the pair behind it.
    read = [f"{name}.dq" if f"{name}.dq" in other.producers else name for name in tensors]
    sides = [(inner_session(model, names), names) for model, names in ((exact, tensors), (changed, read))]
    signal, noise = np.zeros(len(tensors)), np.zeros(len(tensors))
    for image in images:
        values = [session.run(names, {graph.inputs[0]: image[None]}) for session, names in sides]
        for index, (left, right) in enumerate(zip(*values, strict=True)):
            signal[index] += np.square(left, dtype=np.float64).sum()
            noise[index] += np.square(left.astype(np.float64) - right).sum()
    tiny = 1e-100
    decibels = np.minimum(10 * np.log10(np.maximum(signal, tiny) / np.maximum(noise, tiny)), EXACT_DB)
    operators = [graph.producer_type(name) for name in tensors]
    return [TensorError(*row) for row in zip(tensors, operators, decibels.round(2).tolist(), strict=True)]


def first_apart(errors: Sequence[TensorError]) -> TensorError | None:
    """The first tensor in the order of the graph that has parted, if any has."""
    return next((error for error in errors if error.sqnr_db < THRESHOLD_DB), None)


def plot(errors: Sequence[TensorError], path: Path) -> None:
    """Draw the signal-to-noise ratio over the depth of the network."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(errors)), [error.sqnr_db for error in errors], color="#2a6fbb", linewidth=1, marker=".")
    axes.axhline(THRESHOLD_DB, color="0.6", linewidth=1, linestyle="--")
    first = first_apart(errors)
    if first is not None:
        place = list(errors).index(first)
        axes.annotate(
            first.tensor, (place, first.sqnr_db), (0, -14), textcoords="offset points", fontsize=7, ha="center"
        )
    axes.set_xlabel("tensor, in the order of the graph")
    axes.set_ylabel("signal to noise, dB")
    axes.set_title("Error of each tensor against the float32 graph", fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _computes(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether what a node makes has an error of its own to show: the last of what one kernel does counts."""
    if not graph.activations(node) or (node.output[0] not in graph.outputs and not graph.readers(node.output[0])):
        return False
    source = graph.producers.get(node.input[0])
    activates = node.op_type in {"Relu", "Clip"} and source is not None and source.op_type in _COMPUTING
    followed = [reader.op_type for reader in graph.readers(node.output[0])] in (["Relu"], ["Clip"])
    return activates or (node.op_type in _COMPUTING and not followed)


def _is_float(graph: Graph, tensor: str) -> bool:
    """Whether a tensor is float32 in the changed graph; integers and 16-bit types are no outputs that can be asked."""
    types = {value.name: value.type.tensor_type.elem_type for value in graph.model.graph.value_info}
    made = graph.producers[tensor]
    return made.op_type not in {"QuantizeLinear", "Cast"} and types.get(tensor, TensorProto.FLOAT) == TensorProto.FLOAT
