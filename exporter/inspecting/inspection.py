"""What each layer of a network costs and sees, from a trace of its operators.

`layers_from_torch` and `layers_from_onnx` make the trace; here its operators become rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from math import prod
from typing import Any

from convoynet.exporter.errors import BadInput
from convoynet.exporter.inspecting.receptive_field import Axis, Cells, Field, Rule, Shape, image_axis, joined

# The height and the width of a tensor, None where it is not known what its positions see.
Axes = tuple[Axis, Axis] | None


@dataclass(frozen=True)
class WeightFacts:
    """What the numbers of a weight say.

    Attributes:
        count: elements.
        zeros: elements that are zero.
        two_of_four: whether of any four weights in a row along the input channels at most two are not zero, which
            is what NVIDIA's sparse tensor cores take.
    """

    count: int
    zeros: int
    two_of_four: bool


@dataclass(frozen=True)
class Operation:
    """One operator that depends on the image.

    Attributes:
        layer: key of the row; neighbours of the same key are one row, which tells about the last one's output.
        name: of the row.
        type: of the row.
        rule: what it does to the axes of each input.
        reads: the tensors it reads, of those that depend on the image.
        writes: the tensors it makes.
        parameters: elements of the parameters that no operator before it uses.
        macs: multiplications by weights, for one image at the traced size.
        biases: additions beside those, likewise: of a bias, or of inputs that have no weight of their own; None where
            nothing of it counts as a connection.
        precision: of its arithmetic, such as "fp32" or "int8".
        weights: None where the numbers are not there.
    """

    layer: str
    name: str
    type: str
    rule: Rule
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    parameters: int = 0
    macs: int = 0
    biases: int | None = None
    precision: str = "fp32"
    weights: WeightFacts | None = None


@dataclass(frozen=True)
class Trace:
    """A network as it ran on one batch.

    Attributes:
        name: of the network.
        operations: in the order of execution.
        shapes: of the tensors, with the batch; a tensor of unknown shape is missing.
        image: the tensor that is the image.
        image_dims: its dimensions that are height and width.
        unused_parameters: elements of parameters that no operator uses.
        modules: name of a module -> the tensor that its first call returned, in the order in which they returned.
    """

    name: str
    operations: Sequence[Operation]
    shapes: Mapping[str, Shape]
    image: str
    image_dims: tuple[int, int]
    unused_parameters: int = 0
    modules: Mapping[str, str] = field(default_factory=dict)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image that it was traced with."""
        height, width = (self.shapes[self.image][dim] for dim in self.image_dims)
        return height, width


@dataclass(frozen=True)
class Layer:
    """One row; `to_json` says what the numbers are.

    Attributes:
        quiet: it has no parameters, changes neither the shape nor the field, and joins nothing: an activation.
    """

    name: str
    type: str
    output_shape: Shape | None
    parameters: int
    macs: int
    connections: int | None
    field: tuple[Field, Field] | None
    precision: str
    weights: WeightFacts | None
    quiet: bool

    def to_json(self) -> dict[str, Any]:
        """The row as docs/inspecting.md describes it."""
        return {
            "name": self.name,
            "type": self.type,
            "output_shape": None if self.output_shape is None else list(self.output_shape),
            "parameters": self.parameters,
            "macs": self.macs,
            "connections": self.connections,
            "receptive_field": self._along(lambda axis: axis.size),
            "stride": self._along(lambda axis: axis.stride),
            "centre": self._along(lambda axis: axis.centre),
            "dilated_field": self._cells(lambda cells: cells.extent),
            "dilated_unseen": self._cells(lambda cells: cells.unseen),
            "precision": self.precision,
            "sparsity": self.weights and self.weights.zeros / self.weights.count,
            "sparse_2_4": self.weights and self.weights.two_of_four,
        }

    @property
    def cells(self) -> tuple[Cells, Cells] | None:
        """Of the map where the dilated layers began, those that an output is computed from, along both axes."""
        height, width = (axis.cells for axis in self.field) if self.field else (None, None)
        if height is None and width is None:
            return None
        return height or Cells(), width or Cells()

    def _cells(self, number: Callable[[Cells], int]) -> list[int] | None:
        return None if self.cells is None else [number(cells) for cells in self.cells]

    def _along(self, number: Callable[[Field], Fraction | None]) -> list[int | float] | None:
        """A number of the field along height and width; None where either is not known."""
        values = [number(axis) for axis in self.field or ()]
        known = [value.numerator if value.denominator == 1 else float(value) for value in values if value is not None]
        return known if len(known) == 2 else None


@dataclass(frozen=True)
class Inspection:
    """All rows of a network, for an image of (height, width) pixels."""

    name: str
    input_size: tuple[int, int]
    fully_convolutional: bool
    layers: Sequence[Layer]
    unused_parameters: int

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(layer.parameters for layer in self.layers) + self.unused_parameters

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def macs_by_precision(self) -> dict[str, int]:
        """The same by the precision of the arithmetic."""
        found: dict[str, int] = {}
        for layer in self.layers:
            if layer.macs:
                found[layer.precision] = found.get(layer.precision, 0) + layer.macs
        return found

    @property
    def sparsity(self) -> float | None:
        """Share of zeros among the weights; None where the numbers are not there."""
        known = [layer.weights for layer in self.layers if layer.weights]
        return sum(facts.zeros for facts in known) / sum(facts.count for facts in known) if known else None

    def to_json(self) -> dict[str, Any]:
        """The whole as docs/inspecting.md describes it."""
        return {
            "name": self.name,
            "input_size": list(self.input_size),
            "fully_convolutional": self.fully_convolutional,
            "layers": [layer.to_json() for layer in self.layers],
            "totals": {
                "layers": len(self.layers),
                "parameters": self.parameters,
                "unused_parameters": self.unused_parameters,
                "macs": self.macs,
                "macs_by_precision": self.macs_by_precision,
                "sparsity": self.sparsity,
            },
        }


def inspection(trace: Trace, input_size: tuple[int, int] | None = None, *, fully_convolutional: bool) -> Inspection:
    """Work out the rows of a trace.

    Args:
        trace: of a network.
        input_size: (height, width) of the image; other than the traced one for `fully_convolutional` alone.
        fully_convolutional: read the reduction to one position at the end, and the matrices behind it, as
            convolutions over the map that they had when traced (J. Long, E. Shelhamer, T. Darrell 2015, "Fully
            Convolutional Networks for Semantic Segmentation", section 3.1).

    Raises:
        BadInput: the image is too small for the network.
    """
    traced = trace.image_size
    maps = axes_of(trace, traced)
    read = maps
    if fully_convolutional:
        read = axes_of(trace, input_size or traced, spread=_classifier(trace, maps))
        lost = next((item.name for item in trace.operations if item.macs and read[item.writes[0]] is None), None)
        if lost:
            raise BadInput(f"{trace.name} cannot be read as fully convolutional: {lost} has no known positions")
    elif input_size not in (None, traced):
        raise ValueError(f"traced at {traced}, not at {input_size}")
    rows = [list(row) for _, row in groupby(trace.operations, key=lambda operation: operation.layer)]
    return Inspection(
        name=trace.name,
        input_size=input_size or traced,
        fully_convolutional=fully_convolutional,
        layers=[_layer(trace, row, maps, read) for row in rows],
        unused_parameters=trace.unused_parameters,
    )


def axes_of(trace: Trace, size: tuple[int, int], *, spread: frozenset[int] = frozenset()) -> dict[str, Axes]:
    """The axes of every tensor for an image of `size`; the operations numbered in `spread` keep the map.

    Raises:
        BadInput: the image is too small for the network.
    """
    height, width = (image_axis(dim, pixels) for dim, pixels in zip(trace.image_dims, size, strict=True))
    maps: dict[str, Axes] = {trace.image: (height, width)}
    for number, operation in enumerate(trace.operations):
        for made in operation.writes:
            axes = [_axis(trace, operation, maps, made, side, spread=number in spread) for side in (0, 1)]
            maps[made] = None if axes[0] is None or axes[1] is None else (axes[0], axes[1])
            if any(axis is not None and axis.size < 1 for axis in axes):
                raise BadInput(
                    f"an image of {size[0]}x{size[1]} is too small: nothing is left of it at {operation.name}"
                )
    return maps


def _axis(
    trace: Trace, operation: Operation, maps: Mapping[str, Axes], made: str, side: int, *, spread: bool
) -> Axis | None:
    after = trace.shapes.get(made)
    axes = []
    for name in operation.reads:
        known, before = maps[name], trace.shapes.get(name)
        if known is None or before is None or after is None:
            return None
        axis = operation.rule(known[side], before, after, spread=spread)
        if axis is None:
            return None
        axes.append(axis)
    return joined(axes)


def _classifier(trace: Trace, maps: Mapping[str, Axes]) -> frozenset[int]:
    """The numbers of the operations behind which there is no map any more."""
    has_map: set[str] = set()  # tensors from which a map is made
    found = []
    for number, operation in reversed(list(enumerate(trace.operations))):
        leads_to_map = any(name in has_map for name in operation.writes)
        if not leads_to_map:
            found.append(number)
        if leads_to_map or any(_positions(maps[name]) > 1 for name in operation.writes):
            has_map.update(operation.reads)
    return frozenset(found)


def _positions(known: Axes) -> int:
    return 1 if known is None else prod(axis.size for axis in known)


def _layer(trace: Trace, row: Sequence[Operation], maps: Mapping[str, Axes], read: Mapping[str, Axes]) -> Layer:
    last = row[-1]
    output = last.writes[0]
    known = read[output]
    macs = sum(_scaled(operation.macs, operation, maps, read) for operation in row)
    biased = [operation for operation in row if operation.biases is not None]
    biases = sum(_scaled(operation.biases or 0, operation, maps, read) for operation in biased)
    weights = [operation.weights for operation in row if operation.weights]
    return Layer(
        name=last.name,
        type=last.type,
        output_shape=_output_shape(trace.shapes.get(output), known),
        parameters=sum(operation.parameters for operation in row),
        macs=macs,
        connections=macs + biases if biased else None,
        field=None if known is None else (known[0].field(), known[1].field()),
        precision=next((operation.precision for operation in row if operation.macs), last.precision),
        weights=weights[0] if weights else None,
        quiet=all(_is_quiet(operation, trace, read) for operation in row),
    )


def _scaled(amount: int, operation: Operation, maps: Mapping[str, Axes], read: Mapping[str, Axes]) -> int:
    """`amount`, which is right for the traced positions, for those that there are."""
    output = operation.writes[0]
    return int(amount * Fraction(_positions(read[output]), _positions(maps[output])))


def _output_shape(traced: Shape | None, known: Axes) -> Shape | None:
    """The shape without the batch."""
    if traced is None or known is None:
        return None if traced is None else traced[1:]
    height, width = known
    if height.taken is not None and width.taken is not None:  # a flattened map that is read as a map
        return prod(traced[1:]) // (height.taken * width.taken), height.size, width.size
    sizes = {axis.dim: axis.size for axis in known}
    return tuple(sizes.get(dim, size) for dim, size in enumerate(traced))[1:]


def _is_quiet(operation: Operation, trace: Trace, read: Mapping[str, Axes]) -> bool:
    if operation.parameters or operation.macs or len(operation.reads) != 1:
        return False
    (source,), target = operation.reads, operation.writes[0]
    shapes = (
        _output_shape(trace.shapes.get(source), read[source]),
        _output_shape(trace.shapes.get(target), read[target]),
    )
    return shapes[0] == shapes[1] and _fields(read[source]) == _fields(read[target])


def _fields(known: Axes) -> list[Field]:
    return [axis.field() for axis in known] if known else []
