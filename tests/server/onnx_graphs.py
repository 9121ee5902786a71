"""Graphs of a node or a few, as a repository holds them: what they compute is known from ONNX's own definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convoynet.server.types import Tensor

FLOAT, INT64, INT32, UINT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8
Value = tuple[str, int, Sequence[int | str] | None]
"""Name, type and shape of an input or output; None for a shape that the file does not say."""


def node(kind: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    """A node; the names of its inputs and outputs are separated by spaces."""
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def write_graph(
    root: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    constants: Mapping[str, Tensor] | None = None,
    *,
    name: str = "graph",
    config: str = "",
    external: str = "",
) -> Path:
    """Writes a model's folder; `config` is its config.pbtxt, `external` the file that its constants go to."""
    sides = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    tensors = [numpy_helper.from_array(np.asarray(value), key) for key, value in (constants or {}).items()]
    graph = helper.make_graph(nodes, name, *sides, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    folder = root / name
    (folder / "1").mkdir(parents=True)
    more = {"save_as_external_data": True, "location": external, "size_threshold": 0} if external else {}
    onnx.save(model, folder / "1" / "model.onnx", **more)
    # One engine, so that none is measured.
    (folder / "config.pbtxt").write_text(config + "\ninstance_group { count: 1 kind: KIND_CPU }\n")
    return folder
