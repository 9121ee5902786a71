"""Where a graph and the one that it was made from part: the error of each tensor that both compute."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto

from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.running.runtime import Array, inner_session

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Below this a tensor has parted from the other graph's: noise of a tenth of its size.
THRESHOLD_DB = 20.0
# Layers whose names there is room for below the plot.
_MOST_NAMES = 24
# What a tensor without any error is given: float32 itself is good for about 150 dB.
EXACT_DB = 200.0
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_COMPUTING = frozenset({"Conv", "Gemm", "MatMul", "Add", "Concat", "Mul", "BatchNormalization", "LRN", "ConvTranspose"})


@dataclass(frozen=True)
class TensorError:
    """One tensor: its name, the operator that makes it, and its signal-to-noise ratio in decibels.

    `layer` is the layer with weights that it comes from, by the network's own name: itself, or the last one before it.
    """

    tensor: str
    operator: str
    sqnr_db: float
    layer: str = ""


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
    tensors = [name for name in computed(graph) if name in other.producers and _is_float(other, name)]
    if not tensors:
        return []
    names = (tensors, [read_as(other, name) for name in tensors])
    sides = [(inner_session(model, read), read) for model, read in zip((exact, changed), names, strict=True)]
    tally = Tally(len(tensors))
    for image in images:
        tally.add(*(session.run(read, {graph.inputs[0]: image[None]}) for session, read in sides))
    return tally.errors(graph, tensors)


class Tally:
    """Adds up signal and noise of some tensors, batch by batch."""

    def __init__(self, tensors: int) -> None:
        self._signal, self._noise = np.zeros(tensors), np.zeros(tensors)

    def add(self, exact: Sequence[Array], changed: Sequence[Array]) -> None:
        """Take the values that both sides have for the same images, tensor by tensor."""
        for index, (left, right) in enumerate(zip(exact, changed, strict=True)):
            self._signal[index] += np.square(left, dtype=np.float64).sum()
            self._noise[index] += np.square(left.astype(np.float64) - right).sum()

    def errors(self, graph: Graph, tensors: Sequence[str]) -> list[TensorError]:
        """What came of it; `tensors` are the names, which `graph` has. Values that are no numbers have parted."""
        tiny = 1e-100
        decibels = 10 * np.log10(np.maximum(self._signal, tiny) / np.maximum(self._noise, tiny))
        decibels = np.nan_to_num(np.minimum(decibels, EXACT_DB), nan=-EXACT_DB).round(2)
        operators, layers = [graph.producer_type(name) for name in tensors], [_layer(graph, name) for name in tensors]
        return [TensorError(*row) for row in zip(tensors, operators, decibels.tolist(), layers, strict=True)]


def computed(graph: Graph) -> list[str]:
    """The tensors that have an error of their own to show, in the order of the graph."""
    return [node.output[0] for node in graph if _computes(graph, node)]


def read_as(graph: Graph, tensor: str) -> str:
    """The name under which a graph has a tensor of the float graph that it was made from.

    In a quantized graph it is what the readers get, since a ReLU may have gone into the pair behind it; in a graph of
    16-bit types there may be nothing but its 16-bit form.
    """
    forms = (f"{name}{half}" for name in (f"{tensor}.dq", tensor) for half in ("", ".fp16", ".bf16"))
    return next((name for name in forms if name in graph.producers), tensor)


def to_json(errors: Sequence[TensorError], images: int) -> dict[str, Any]:
    """The report's `divergence`; `images` is their number."""
    first = first_apart(errors)
    return {
        "images": images,
        "threshold_db": THRESHOLD_DB,
        "first": asdict(first) if first else None,
        "tensors": [asdict(error) for error in errors],
    }


def first_apart(errors: Sequence[TensorError]) -> TensorError | None:
    """The first tensor in the order of the graph that has parted, if any has."""
    return next((error for error in errors if error.sqnr_db < THRESHOLD_DB), None)


def plot(errors: Sequence[TensorError], path: Path) -> None:
    """Draw the signal-to-noise ratio over the depth of the network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(errors)), [error.sqnr_db for error in errors], color="#2a6fbb", linewidth=1, marker=".")
    axes.axhline(THRESHOLD_DB, color="0.6", linewidth=1, linestyle="--")
    first = first_apart(errors)
    if first is not None:
        place = list(errors).index(first)
        name = first.tensor if first.layer in ("", first.tensor) else f"{first.tensor}, behind {first.layer}"
        axes.annotate(name, (place, first.sqnr_db), (0, -14), textcoords="offset points", fontsize=7, ha="center")
        axes.margins(y=0.15)
    _name_layers(axes, errors)
    axes.set_ylabel("signal to noise, dB")
    axes.set_title("Error of each tensor against the float32 graph", fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _name_layers(axes: "Axes", errors: Sequence[TensorError]) -> None:
    """Marks the layers by their names in the network, as many as there is room for."""
    places = [place for place, error in enumerate(errors) if error.layer == error.tensor]
    chosen = places[:: -(-len(places) // _MOST_NAMES) or 1]
    if not chosen:
        axes.set_xlabel("tensor, in the order of the graph")
        return
    names = [errors[place].tensor for place in chosen]
    axes.set_xticks(chosen, names, rotation=35, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_xlabel("tensor, in the order of the graph; layers with weights are named", fontsize=8)


def _computes(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether what a node makes has an error of its own to show: the last of what one kernel does counts."""
    if not graph.activations(node) or (node.output[0] not in graph.outputs and not graph.readers(node.output[0])):
        return False
    source = graph.producers.get(node.input[0])
    activates = node.op_type in {"Relu", "Clip"} and source is not None and source.op_type in _COMPUTING
    followed = [reader.op_type for reader in graph.readers(node.output[0])] in (["Relu"], ["Clip"])
    return activates or (node.op_type in _COMPUTING and not followed)


def _layer(graph: Graph, tensor: str) -> str:
    """The result of the last layer with weights on the way to a tensor, by first inputs; "" where there is none."""
    while (node := graph.producers.get(tensor)) is not None:
        if node.op_type in _LAYERS:
            return tensor
        tensor = node.input[0] if node.input else ""
    return ""


def _is_float(graph: Graph, tensor: str) -> bool:
    """Whether a tensor is float32 in the changed graph; integers and 16-bit types are no outputs that can be asked."""
    types = {value.name: value.type.tensor_type.elem_type for value in graph.model.graph.value_info}
    made = graph.producers[tensor]
    return made.op_type not in {"QuantizeLinear", "Cast"} and types.get(tensor, TensorProto.FLOAT) == TensorProto.FLOAT
