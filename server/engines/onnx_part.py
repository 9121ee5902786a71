"""The part of an ONNX graph that some of its outputs need, cut out without the package onnx.

The file is protobuf: what stays is copied as it is, byte for byte.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from convoynet.server.errors import InvalidModel

_DEEPEST = 32
"""Graphs within graphs (If, Loop, Scan)."""
_GRAPH = 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12
"""Fields of ModelProto and of GraphProto."""


class _Field(NamedTuple):
    """A field of a message: all of it, and the message or text that it holds; empty where it is a number."""

    number: int
    whole: memoryview
    held: memoryview


def cut_out(file: Path, outputs: Collection[str]) -> bytes:
    """The model with these outputs alone, and with the nodes, constants and defaults of inputs that they need.

    Raises:
        InvalidModel: It is no ONNX file.
        OSError: It cannot be read.
    """
    try:
        model = list(_fields(memoryview(file.read_bytes())))
        parts: list[bytes | memoryview] = []
        for field in model:
            if field.number != _GRAPH:
                parts.append(field.whole)
                continue
            kept = [one.whole for one in _needed(list(_fields(field.held)), outputs)]
            parts += [bytes([_GRAPH << 3 | 2]), _varint(sum(map(len, kept))), *kept]
    except (ValueError, IndexError) as error:
        raise InvalidModel(f"{file.name} is no ONNX file: {error}") from None
    return b"".join(parts)


def _needed(graph: list[_Field], outputs: Collection[str]) -> list[_Field]:
    nodes = [field for field in graph if field.number == _NODE]
    makers = {name: node for node in nodes for name in _texts(node.held, 2)}
    kept: set[int] = set()
    names: set[str] = set()
    wanted = set(outputs)
    ahead = list(wanted)
    while ahead:
        name = ahead.pop()
        if name in names:
            continue
        names.add(name)
        maker = makers.get(name)
        if maker is not None and id(maker) not in kept:
            kept.add(id(maker))
            ahead += _read(maker.held, 0)
    defaults = {name for field in graph if field.number == _INITIALIZER for name in _texts(field.held, 8)}

    def stays(field: _Field) -> bool:
        if field.number == _NODE:
            return id(field) in kept
        if field.number == _OUTPUT:
            return not wanted.isdisjoint(_texts(field.held, 1))
        if field.number == _INITIALIZER:
            return not names.isdisjoint(_texts(field.held, 8))
        # An input that there is a default for goes with it; another one is stated in config.pbtxt.
        unneeded = field.number == _INPUT and names.isdisjoint(_texts(field.held, 1))
        return not (unneeded and not defaults.isdisjoint(_texts(field.held, 1)))

    return [field for field in graph if stays(field)]


def _read(node: memoryview, depth: int) -> list[str]:
    """The tensors that a node reads, those of the graph around it among them that graphs in it do."""
    if depth > _DEEPEST:
        raise ValueError(f"its graphs lie more than {_DEEPEST} deep")
    found = _texts(node, 1)
    for attribute in (field.held for field in _fields(node) if field.number == 5):
        for graph in (field.held for field in _fields(attribute) if field.number in (6, 11)):
            for field in _fields(graph):
                if field.number == _NODE:
                    found += _read(field.held, depth + 1)
                elif field.number == _OUTPUT:  # which may be a tensor from around it, as it is
                    found += _texts(field.held, 1)
    return found


def _texts(message: memoryview, number: int) -> list[str]:
    return [bytes(field.held).decode() for field in _fields(message) if field.number == number]


def _fields(message: memoryview) -> Iterator[_Field]:
    at = 0
    while at < len(message):
        begin = at
        key, at = _number(message, at)
        start = at
        match key & 7:
            case 0:
                _, at = _number(message, at)
                start = at
            case 1 | 5:
                at += 8 if key & 7 == 1 else 4
                start = at
            case 2:
                length, start = _number(message, at)
                at = start + length
            case _:
                raise ValueError("it is not protobuf")
        if at > len(message):
            raise ValueError("it ends too early")
        yield _Field(key >> 3, message[begin:at], message[start:at])


def _number(message: memoryview, at: int) -> tuple[int, int]:
    """The number that stands there, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("it is not protobuf")


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
