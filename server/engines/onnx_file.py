"""What an ONNX file says of itself that no runtime tells, read without the package onnx.

The file is protobuf. Its fields are walked through, and the weights are stepped over, so that their size costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from convoynet.server.errors import InvalidModel

_DEEPEST = 32
"""Graphs within graphs (If, Loop, Scan); those of files that are meant to be run lie two or three deep."""
_MOST_TEXT = 4096
"""The longest name that is looked at."""
_HALF = frozenset({10, 16})
"""TensorProto's numbers of FLOAT16 and BFLOAT16."""
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantize", "QLinear", "ConvInteger", "MatMulInteger")


@dataclass
class OnnxFile:
    """What was found in a file, in all of its graphs.

    Attributes:
        operators: Names of operators.
        types: Numbers of the types of its weights and constants.
        external: Files beside it that hold weights, by the names that it gives them.
        unranked: Inputs and outputs of which it does not say how many dimensions they have.
        rows: The name of the first dimension of inputs and outputs, where it is free and has one.
    """

    operators: set[str] = field(default_factory=set)
    types: set[int] = field(default_factory=set)
    external: set[str] = field(default_factory=set)
    unranked: set[str] = field(default_factory=set)
    rows: dict[str, str] = field(default_factory=dict)

    @property
    def is_quantized(self) -> bool:
        """Whether it computes in integers, where engines may round otherwise."""
        return any(name.startswith(_QUANTIZED) for name in self.operators)

    @property
    def is_half(self) -> bool:
        """Whether some of it is in 16 bits."""
        return not self.types.isdisjoint(_HALF)


def read_onnx(file: Path) -> OnnxFile:
    """Reads a file.

    Raises:
        InvalidModel: It is no ONNX file.
        OSError: It cannot be read.
    """
    found = OnnxFile()
    with file.open("rb") as opened:
        try:
            for number, part in _Part(opened, file.stat().st_size).fields():
                if number == 7:
                    _graph(part, found, 0)
                elif number == 25:  # a function
                    _nodes(part, 7, found, 0)
        except ValueError as error:
            raise InvalidModel(f"{file.name} is no ONNX file: {error}") from None
    return found


class _Part:
    """A message, or a number, in the file: where it begins and ends. Nothing of it is read before it is asked for."""

    def __init__(self, file: BinaryIO, end: int, start: int = 0, number: int = 0) -> None:
        self._file, self._start, self._end, self.number = file, start, end, number

    def fields(self) -> Iterator[tuple[int, _Part]]:
        """Each field of the message, by its number."""
        at = self._start
        while at < self._end:
            self._file.seek(at)
            key = self._varint()
            if (wire := key & 7) == 0:
                part = _Part(self._file, 0, number=self._varint())
                at = self._file.tell()
            elif wire in (1, 5):
                at = self._file.tell() + (8 if wire == 1 else 4)
                part = _Part(self._file, at, at)
            elif wire == 2:
                length = self._varint()
                start = self._file.tell()
                at = start + length
                part = _Part(self._file, at, start)
            else:
                raise ValueError("it is not protobuf")
            if at > self._end:
                raise ValueError("it ends too early")
            yield key >> 3, part

    def text(self) -> str:
        """The field as text."""
        self._file.seek(self._start)
        return self._file.read(min(self._end - self._start, _MOST_TEXT)).decode(errors="replace")

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._file.read(1)
            if not byte:
                break
            value |= (byte[0] & 127) << shift
            if byte[0] < 128:
                return value
        raise ValueError("it ends too early")


def _graph(graph: _Part, found: OnnxFile, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"its graphs lie more than {_DEEPEST} deep")
    _nodes(graph, 1, found, depth)
    for number, part in graph.fields():
        if number == 5:
            _tensor(part, found)
        elif number == 15:
            _sparse(part, found)
        elif number in (11, 12) and not depth:
            _value(part, found)


def _nodes(owner: _Part, own: int, found: OnnxFile, depth: int) -> None:
    """The nodes of a graph or function, which are its fields of this number."""
    for number, node in owner.fields():
        for inner, part in node.fields() if number == own else ():
            if inner == 4:
                found.operators.add(part.text())
            elif inner == 5:
                _attribute(part, found, depth)


def _attribute(attribute: _Part, found: OnnxFile, depth: int) -> None:
    for number, part in attribute.fields():
        if number in (5, 10):
            _tensor(part, found)
        elif number in (6, 11):
            _graph(part, found, depth + 1)
        elif number in (22, 23):
            _sparse(part, found)


def _sparse(tensor: _Part, found: OnnxFile) -> None:
    for number, part in tensor.fields():
        if number in (1, 2):
            _tensor(part, found)


def _tensor(tensor: _Part, found: OnnxFile) -> None:
    for number, part in tensor.fields():
        if number == 2:
            found.types.add(part.number)
        elif number == 13:
            entry = {inner: each.text() for inner, each in part.fields()}
            if entry.get(1) == "location":
                found.external.add(entry.get(2, ""))


def _value(value: _Part, found: OnnxFile) -> None:
    """An input or output: its name, whether its type has a shape, and what the first dimension there is called."""
    name, shape = "", None
    for number, part in value.fields():
        if number == 1:
            name = part.text()
        elif number == 2:
            tensors = (inner for kind, inner in part.fields() if kind == 1)
            shape = next((of for tensor in tensors for inner, of in tensor.fields() if inner == 2), None)
    if shape is None:
        found.unranked.add(name)
        return
    first = next((dimension for number, dimension in shape.fields() if number == 1), None)
    for number, part in first.fields() if first is not None else ():
        if number == 2 and part.text():
            found.rows[name] = part.text()
