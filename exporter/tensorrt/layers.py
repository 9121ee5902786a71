"""What each layer of an engine reads, computes in and writes, from the parsed network or from the engine itself."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

# Of TensorRT's DataType, where our names differ.
_PRECISIONS = {"FLOAT": "fp32", "HALF": "fp16"}
# In the words of the engine inspector, such as "Row major linear FP16 format" or "Int8 NC/32HW32".
_INSPECTED = {
    "fp32": r"fp32|float32|float",
    "fp16": r"fp16|float16|half",
    "bf16": r"bf16|bfloat16",
    "fp8": r"fp8|float8",
    "int8": r"int8",
    "uint8": r"uint8",
    "int32": r"int32",
    "int64": r"int64",
    "bool": r"bool",
}
# Layers that hold or convert numbers.
_NO_WORK = {"CONSTANT", "QUANTIZE", "DEQUANTIZE", "CAST"}
_COMPUTING = {"fp32", "fp16", "bf16", "fp8", "int8"}


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: as the ONNX graph has it; several joined by " + " where the engine fused them.
        type: in TensorRT's words, "CONVOLUTION".
        precision: of its first output: "fp32", "fp16", "bf16", "fp8", "int8", or a type of indices and pixels.
        inputs: the types that it reads. In a parsed network a type before a DequantizeLinear counts: that is what
            TensorRT's kernels read.
    """

    name: str
    type: str
    precision: str
    inputs: tuple[str, ...] = ()

    @property
    def computes(self) -> str:
        """The precision of its sums' operands: of data and weights where they are alike, else of its output."""
        operands = set(self.inputs[:2])
        return operands.pop() if len(operands) == 1 else self.precision


def by_precision(layers: Iterable[Layer]) -> dict[str, int]:
    """How many layers compute in each precision, most first; those that hold or convert numbers are left out."""
    working = [layer.computes for layer in layers if layer.type not in _NO_WORK]
    return dict(Counter(kind for kind in working if kind in _COMPUTING).most_common())


def of_network(network: Any) -> tuple[Layer, ...]:
    """The layers of a parsed network, before TensorRT fuses them."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {
        layer.get_output(index).name: layer
        for layer in layers
        if layer.type.name == "DEQUANTIZE"
        for index in range(layer.num_outputs)
    }
    return tuple(
        Layer(
            layer.name,
            layer.type.name,
            # The condition of a loop is a layer without results.
            _precision(result) if (result := layer.get_output(0)) is not None else "",
            tuple(_precision(_read(tensor, producers)) for tensor in _inputs(layer)),
        )
        for layer in layers
    )


def _inputs(layer: Any) -> Iterator[Any]:
    found = (layer.get_input(index) for index in range(layer.num_inputs))
    return (tensor for tensor in found if tensor is not None)


def _read(tensor: Any, dequantizers: dict[str, Any]) -> Any:
    """The tensor that a kernel reads in the place of `tensor`: where that was dequantized, the integers."""
    dequantizer = dequantizers.get(tensor.name)
    return tensor if dequantizer is None else dequantizer.get_input(0)


def _precision(tensor: Any) -> str:
    name: str = tensor.dtype.name
    return _PRECISIONS.get(name, name.lower())


def of_engine(inspected: str) -> tuple[Layer, ...]:
    """The layers of an engine, from the JSON of its inspector; an engine without details has names alone."""
    layers = json.loads(inspected).get("Layers", [])
    return tuple(
        Layer(
            layer["Name"],
            layer.get("LayerType", ""),
            next(iter(_types(layer.get("Outputs", []))), ""),
            tuple(_types(layer.get("Inputs", []))),
        )
        if isinstance(layer, dict)
        else Layer(layer, "", "")
        for layer in layers
    )


def _types(tensors: list[dict[str, Any]]) -> Iterator[str]:
    for tensor in tensors:
        words = str(tensor.get("Format/Datatype", tensor.get("Datatype", "")))
        yield next((name for name, like in _INSPECTED.items() if re.search(rf"\b({like})\b", words, re.I)), "")
