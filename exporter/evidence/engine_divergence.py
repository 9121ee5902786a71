"""The layer at which an engine parts from its graph: inner tensors of the engine against ONNX Runtime's.

An output is written to memory, so that TensorRT fuses nothing across it: an engine in which every tensor is marked is
another engine. So a few are marked at a time, first where the whole network passes through one tensor, and the search
goes on between the last that is right and the first that is wrong.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.engine_options import BuildOptions
from convoynet.exporter.evidence.divergence import (
    THRESHOLD_DB,
    Tally,
    TensorError,
    computed,
    first_apart,
    read_as,
    to_json,
)
from convoynet.exporter.graph.onnx_graph import Graph, element_types
from convoynet.exporter.progress import Quiet
from convoynet.exporter.running.runtime import Array, inner_session
from convoynet.exporter.tensorrt.build import build
from convoynet.exporter.tensorrt.runner import Plan

# Tensors that one engine returns besides its outputs: few enough to leave most of its fusions alone.
MARKS = 8
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})

# Runs a batch and returns the tensors that are asked for.
Run = Callable[[Array, Sequence[str]], Mapping[str, Array]]
# Makes an engine of a graph.
Load = Callable[[onnx.ModelProto], Run]


@dataclass(frozen=True)
class EngineDivergence:
    """What a search found.

    Attributes:
        tensors: the inner tensors that were compared, in the order of the graph.
        outputs: the outputs of the engine as it is, in which nothing is marked.
        engines: how many engines were built.
        images: number of images.
    """

    tensors: list[TensorError]
    outputs: list[TensorError]
    engines: int
    images: int

    @property
    def first(self) -> TensorError | None:
        """The first tensor that has parted, if any has."""
        return first_apart(self.tensors)

    @property
    def line(self) -> str:
        """The finding, for people."""
        if self.first is not None:
            return f"the engine diverges at {self.first.tensor} ({self.first.operator}, {self.first.sqnr_db:.0f} dB)"
        worst = first_apart(self.outputs)
        if worst is not None:
            return (
                f"the engine diverges in {worst.tensor} ({worst.sqnr_db:.0f} dB), but not where inner tensors are "
                "outputs: TensorRT fuses layers wrongly there"
            )
        return f"the engine is its graph: no tensor is below {THRESHOLD_DB:.0f} dB"

    def to_json(self) -> dict[str, Any]:
        """The report's `divergence`, with what an engine has in addition."""
        return to_json(self.tensors, self.images) | {
            "outputs": [asdict(error) for error in self.outputs],
            "engines": self.engines,
            "line": self.line,
        }


def engine_divergence(
    model: onnx.ModelProto, reference: onnx.ModelProto, images: Array, load: Load, *, optimized: bool = True
) -> EngineDivergence:
    """Find the first tensor that an engine computes differently.

    Args:
        model: the graph of the engine.
        reference: the graph whose values are right, run in ONNX Runtime on the CPU: `model` itself, to see whether
            TensorRT computes what it says, or the float32 graph that it was made from.
        images: what both take as their input, one batch that the engine's profiles allow.
        load: makes engines of `model` with marked outputs, as `plans` does.
        optimized: as for `convoynet.exporter.running.runtime.Session`; False for an FP8 graph.
    """
    graph, exact = Graph(model), Graph(reference)
    search = _Search(graph, exact, images, load, optimized=optimized)
    outputs = search.compare(model, [name for name in graph.outputs if name in exact.outputs and search.is_float(name)])
    tensors = [name for name in computed(exact) if search.is_float(name)]
    known: dict[str, TensorError] = {}
    suspects = [name for name in tensors if name not in graph.outputs]
    while suspects:
        marks = cut_points(exact, suspects)
        errors = search.compare(marked(model, [read_as(graph, name) for name in marks]), marks)
        known |= {error.tensor: error for error in errors}
        first = first_apart(errors)
        if first is None:
            break
        at = marks.index(first.tensor)
        after = suspects.index(marks[at - 1]) + 1 if at else 0
        suspects = suspects[after : suspects.index(first.tensor)]
    found = [known[name] for name in tensors if name in known]
    return EngineDivergence(found, outputs, search.engines, len(images))


def plans(options: BuildOptions, preprocess: Preprocess) -> Load:
    """Engines that TensorRT builds here and that run on this machine's first GPU.

    Raises, where it is called:
        Missing: no TensorRT, or no GPU.
        BadInput: the builder refuses the graph, or the GPU the engine.
    """

    def load(model: onnx.ModelProto) -> Run:
        return Plan(build(model.SerializeToString(), options, Quiet()).content, preprocess).run

    return load


def cut_points(graph: Graph, suspects: Sequence[str], most: int = MARKS) -> list[str]:
    """Choose the tensors to mark: the last, and others that divide the rest, in the order of the graph.

    Args:
        graph: the graph that they are from.
        suspects: tensors in its order, one at least.
        most: how many to choose; all of `suspects` where they are no more.
    """
    if len(suspects) <= most:
        return list(suspects)
    through = waists(graph)
    step = len(suspects) / most
    chosen = {suspects[-1]}
    for index in range(1, most):
        ideal = round(index * step) - 1
        reach = [at for at in range(len(suspects)) if abs(at - ideal) < step / 2 and suspects[at] in through]
        chosen.add(suspects[min(reach, key=lambda at: abs(at - ideal), default=ideal)])
    return [name for name in suspects if name in chosen]


def waists(graph: Graph) -> Set[str]:
    """The tensors that everything after them depends on the input through: no branch runs past them."""
    depends, order = set(graph.inputs), []
    for node in graph:
        if depends.intersection(node.input):
            depends.update(node.output)
            order.append(node)
    last = {name: index for index, node in enumerate(order) for name in node.input if name in depends}
    last |= dict.fromkeys(graph.outputs, len(order))
    found, waiting = set(), set(graph.inputs)
    for index, node in enumerate(order):
        waiting = {name for name in (*waiting, *node.output) if last.get(name, -1) > index}
        if len(waiting) == 1:
            found |= waiting
    return found


def marked(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of a graph that returns inner tensors after its outputs, with the types that TensorRT wants stated."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    present = {value.name for value in made.graph.output}
    types = element_types(model)
    made.graph.output.extend(
        helper.make_tensor_value_info(name, types[name], None) for name in tensors if name not in present
    )
    return made


class _Search:
    """Builds engines, runs them and compares, with ONNX Runtime's values at hand."""

    def __init__(self, graph: Graph, exact: Graph, images: Array, load: Load, *, optimized: bool) -> None:
        self._graph, self._exact = graph, exact
        self._images = images
        self._load = load
        self._optimized = optimized
        self._types = element_types(graph.model), element_types(exact.model)
        self.engines = 0

    def is_float(self, tensor: str) -> bool:
        """Whether both sides have it, as numbers that can be compared."""
        sides = zip((self._graph, self._exact), self._types, strict=True)
        names = [(read_as(side, tensor), side, types) for side, types in sides]
        return all(name in side.producers and types.get(name) in _FLOATS for name, side, types in names)

    def compare(self, model: onnx.ModelProto, tensors: Sequence[str]) -> list[TensorError]:
        """The errors of tensors that `model`, the graph with marks, returns."""
        own, right = ([read_as(side, name) for name in tensors] for side in (self._graph, self._exact))
        session = inner_session(self._exact.model, right, optimized=self._optimized)
        expected = session.run(right, {self._exact.inputs[0]: self._images})
        self.engines += 1
        found = self._load(model)(self._images, own)
        tally = Tally(len(tensors))
        tally.add(expected, [found[name] for name in own])
        return tally.errors(self._exact, tensors)
