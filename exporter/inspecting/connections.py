"""How much of a network lies between a position of the image and one output: the connections on the ways between them.

A stack of five layers of three taps joins its output with each of eleven positions. With the outermost one way does it,
which is five connections long; with the middle 37 connections: 5, 13, 24, 31, 36, 37, 36, 31, 24, 13, 5. Each counts
once, however many ways lead over it (the ways themselves are 1, 5, 15, 30, 45, 51 and so on). The count says why the
middle of a field has more say than its edge before anything is learned.

It is taken along each axis by itself, in rows or columns of cells. A connection joins a cell with one that a layer of
weights makes of it, or a pooling or an interpolation of several cells; what works cell by cell (activations, sums of
branches) makes none. Cells of the padding are none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from convoynet.exporter.inspecting.inspection import Axes, Operation, Trace
from convoynet.exporter.inspecting.receptive_field import Adaptive, Axis, Multiplied, Reduced, Window, Windowed
from convoynet.exporter.inspecting.seen import back

Matrix = NDArray[np.bool_]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class _Edges:
    """What joins a tensor that an operation reads with the one that it makes.

    Attributes:
        read, made: the tensors.
        joined: [cells that are read, cells that are made].
        counted: whether its connections count.
    """

    read: str
    made: str
    joined: Matrix
    counted: bool


def connections(trace: Trace, maps: Mapping[str, Axes], tensor: str, position: tuple[int, int]) -> list[Counts] | None:
    """Count them for every row and every column of the image.

    Args:
        trace: of the network.
        maps: the axes of its tensors.
        tensor: the map.
        position: (row, column) of the output in it.

    Returns:
        Along the height and along the width; None where it is not known what some operator on the way sees.
    """
    found = [_along(trace, maps, side, tensor, position[side]) for side in (0, 1)]
    known = [counts for counts in found if counts is not None]
    return known if len(known) == 2 else None


def _along(trace: Trace, maps: Mapping[str, Axes], side: int, tensor: str, position: int) -> Counts | None:
    """Those of one axis: forwards from every pixel, over what leads to the output."""
    ways = _ways(trace, maps, side, tensor, position)
    if ways is None:
        return None
    edges, wanted = ways
    pixels = trace.image_size[side]
    reached: dict[str, Matrix] = {trace.image: np.eye(pixels, dtype=bool)}
    counts = np.zeros(pixels, np.int64)
    for edge in edges:
        if edge.read not in reached:
            continue
        joined = edge.joined & wanted[edge.made]
        if edge.counted:
            counts += reached[edge.read] @ joined.sum(axis=1)
        seen = (reached[edge.read].astype(np.float32) @ joined.astype(np.float32)) > 0
        reached[edge.made] = seen | reached[edge.made] if edge.made in reached else seen
    counts[~reached[tensor][:, position]] = 0
    return counts


def _ways(
    trace: Trace, maps: Mapping[str, Axes], side: int, tensor: str, position: int
) -> tuple[list[_Edges], dict[str, Matrix]] | None:
    """What leads to the output, in the order of execution, and the cells of each tensor that do."""
    end = maps[tensor]
    if end is None:
        return None
    wanted: dict[str, Matrix] = {tensor: np.arange(end[side].size) == position}
    edges: list[_Edges] = []
    for operation, read, made in back(trace, wanted):
        before, after = maps[read], maps[made]
        if before is None or after is None:
            return None
        edge = _edges(operation, (read, before[side]), (made, after[side]))
        if edge is None:
            return None
        edges.append(edge)
        leads = edge.joined[:, wanted[made]].any(axis=1)
        wanted[read] = np.logical_or(leads, wanted.get(read, False))
    return edges[::-1], wanted


def _edges(operation: Operation, read_along: tuple[str, Axis], made_along: tuple[str, Axis]) -> _Edges | None:
    """How one operation joins two tensors along an axis; None where that is not known."""
    (read, before), (made, after) = read_along, made_along
    rule, sizes = operation.rule, (before.size, after.size)
    window = rule.windows.get(before.dim) if isinstance(rule, Windowed) and before.dim is not None else None
    if window is not None:
        counted = window.extent > 0 or operation.macs > 0
        return _Edges(read, made, _windows(window, *sizes), counted)
    if isinstance(rule, Adaptive):
        return _Edges(read, made, _parts(*sizes), counted=True)
    if before.size == after.size:
        return _Edges(read, made, np.eye(before.size, dtype=bool), counted=isinstance(rule, Multiplied))
    if 1 in sizes:  # all positions to one, or one to all: a gate
        return _Edges(read, made, np.ones(sizes, bool), counted=isinstance(rule, Reduced | Multiplied))
    return None


def _windows(window: Window, before: int, after: int) -> Matrix:
    joined = np.zeros((before, after), bool)
    for output in range(after):
        first, last = window.cells((output, output), before)
        cells = np.arange(first, last + 1, window.step)
        joined[cells[(cells >= 0) & (cells < before)], output] = True
    return joined


def _parts(before: int, after: int) -> Matrix:
    """Of a pooling to a number of cells."""
    joined = np.zeros((before, after), bool)
    for output in range(after):
        joined[output * before // after : ceil((output + 1) * before / after), output] = True
    return joined
