"""Which pixels one output can depend on, from the output back to the image, operator by operator.

An `Axis` tells of all outputs at once, so between the cells of an interpolation it is right to half a cell.
"""

from collections.abc import Container, Iterator, Mapping

from convoynet.exporter.inspecting.inspection import Axes, Operation, Trace
from convoynet.exporter.inspecting.receptive_field import Adaptive, Axis, Rule, Windowed

Ends = tuple[int, int]
"""The first and the last, of rows or columns; beyond the image where zeros are padded."""


def seen(trace: Trace, maps: Mapping[str, Axes], tensor: str, position: tuple[int, int]) -> tuple[Ends, Ends] | None:
    """The rows and the columns of the image.

    Args:
        trace: of the network.
        maps: the axes of its tensors.
        tensor: the map.
        position: (row, column) of the output in it.

    Returns:
        None where it is not known what some operator on the way reads.
    """
    rows, columns = (_along(trace, maps, side, tensor, position[side]) for side in (0, 1))
    return None if rows is None or columns is None else (rows, columns)


def back(trace: Trace, wanted: Container[str]) -> Iterator[tuple[Operation, str, str]]:
    """Each operation that makes a tensor that is wanted, with each that it reads and the one that it makes.

    From the last to the first: whoever wants what is read, says so before the next.
    """
    for operation in reversed(trace.operations):
        for made in operation.writes:
            if made in wanted:
                yield from ((operation, read, made) for read in dict.fromkeys(operation.reads))


def _along(trace: Trace, maps: Mapping[str, Axes], side: int, tensor: str, position: int) -> Ends | None:
    wanted: dict[str, Ends] = {tensor: (position, position)}
    for operation, read, made in back(trace, wanted):
        before, after = maps[read], maps[made]
        if before is None or after is None:
            return None
        ends = _read(operation.rule, before[side], after[side], wanted[made])
        if ends is None:
            return None
        known = wanted.get(read, ends)
        wanted[read] = (min(known[0], ends[0]), max(known[1], ends[1]))
    return wanted.get(trace.image)


def _read(rule: Rule, before: Axis, after: Axis, outputs: Ends) -> Ends | None:
    """What outputs from one to another read of one input; None where that is not known."""
    window = rule.windows.get(before.dim) if isinstance(rule, Windowed) and before.dim is not None else None
    if window is not None:
        return window.cells(outputs, before.size)
    if isinstance(rule, Adaptive):
        first, last = outputs
        return first * before.size // after.size, -(-(last + 1) * before.size // after.size) - 1
    if before.size == after.size:
        return outputs
    # All positions to one, or one to all: a gate.
    return (0, before.size - 1) if 1 in (before.size, after.size) else None
