"""Messages for the models that both servers have, and what is wrong with them on purpose."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import Message

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server import datatypes

KEY = f"/convoy_parity_{os.getpid()}"
"""POSIX name of the region that the test makes: REGION_BYTES bytes, float32 ones."""
REGION_BYTES = 256

VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False],
    "UINT8": [0, 255],
    "UINT16": [1, 65535],
    "UINT32": [2, 2**32 - 1],
    "UINT64": [3, 2**64 - 1],
    "INT8": [-128, 127],
    "INT16": [-(2**15), 2**15 - 1],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1],
    "FP32": [1.5, -1e30],
    "FP64": [2.5, 1e300],
}
"""Two elements of each datatype that the model `types` takes and gives back; `half` and `texts` do so with others."""
_CONTENTS = {"BOOL": "bool", "INT8": "int", "INT16": "int", "INT32": "int", "UINT8": "uint", "UINT16": "uint"} | {
    "UINT32": "uint", "FP32": "fp32", "FP64": "fp64", "INT64": "int64", "UINT64": "uint64",
}  # fmt: skip


class Case(NamedTuple):
    """One call; `messages` are a stream's, one otherwise; `metadata` goes with it."""

    name: str
    rpc: str
    messages: tuple[Message, ...]
    metadata: tuple[tuple[str, str], ...] = ()


def infer(rows: int = 1, **fields: Any) -> pb.ModelInferRequest:
    """A request of the model `linear` with rows 1 2 3 4, 5 6 7 8 ...; `fields` are set after that."""
    values = np.arange(1, 4 * rows + 1, dtype=np.float32).reshape(rows, 4)
    message = pb.ModelInferRequest(model_name="linear")
    message.inputs.add(name="input", datatype="FP32", shape=values.shape)
    message.raw_input_contents.append(values.tobytes())
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def parameter(value: Any) -> pb.InferParameter:
    """An integer as int64, unless it is given as the oneof's own (field, value)."""
    if isinstance(value, tuple):
        return pb.InferParameter(**{value[0]: value[1]})
    kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
    return pb.InferParameter(**{kind: value})


def with_parameters(message: pb.ModelInferRequest, **values: Any) -> pb.ModelInferRequest:
    for name, value in values.items():
        message.parameters[name].CopyFrom(parameter(value))
    return message


def of_input(message: pb.ModelInferRequest, **fields: Any) -> pb.ModelInferRequest:
    """Changes the first input; a parameter of it where the field's name begins with `shared_memory`."""
    tensor = message.inputs[0]
    for name, value in fields.items():
        if name.startswith("shared_memory"):
            tensor.parameters[name].CopyFrom(parameter(value))
        elif name == "shape":
            tensor.shape[:] = value
        else:
            setattr(tensor, name, value)
    return message


def of_output(message: pb.ModelInferRequest, name: str = "logits", **values: Any) -> pb.ModelInferRequest:
    output = message.outputs.add(name=name)
    for key, value in values.items():
        output.parameters[key].CopyFrom(parameter(value))
    return message


def no_raw(message: pb.ModelInferRequest) -> pb.ModelInferRequest:
    del message.raw_input_contents[:]
    return message


def typed(message: pb.ModelInferRequest, *values: Any, field: str = "fp32_contents") -> pb.ModelInferRequest:
    getattr(no_raw(message).inputs[0].contents, field).extend(values)
    return message


def every_type(*, as_contents: bool) -> pb.ModelInferRequest:
    """Both elements of each datatype."""
    message = pb.ModelInferRequest(model_name="types")
    for datatype, values in VALUES.items():
        tensor = message.inputs.add(name=f"in_{datatype}", datatype=datatype, shape=[2])
        if as_contents:
            getattr(tensor.contents, f"{_CONTENTS[datatype]}_contents").extend(values)
        else:
            array = np.array(values, datatypes.numpy_dtype(datatype))
            message.raw_input_contents.append(datatypes.encode(array, datatype))
    return message


def of_values(*values: float) -> pb.ModelInferRequest:
    message = infer()
    message.raw_input_contents[0] = np.array(values, np.float32).tobytes()
    return message


def typed_of_int8(value: int) -> pb.ModelInferRequest:
    message = every_type(as_contents=True)
    index = [t.name for t in message.inputs].index("in_INT8")
    message.inputs[index].contents.int_contents[0] = value
    return message


def texts(raw: bytes) -> pb.ModelInferRequest:
    """Two BYTES elements for the model `texts`."""
    message = pb.ModelInferRequest(model_name="texts", raw_input_contents=[raw])
    message.inputs.add(name="in_BYTES", datatype="BYTES", shape=[2])
    return message


def empty_parameter() -> pb.ModelInferRequest:
    message = infer()
    message.parameters["note"].SetInParent()
    return message


def region(name: str = "r", key: str = KEY, offset: int = 0, size: int = REGION_BYTES) -> Message:
    return pb.SystemSharedMemoryRegisterRequest(name=name, key=key, offset=offset, byte_size=size)


def from_region(name: str = "r", size: int = 16, **more: Any) -> pb.ModelInferRequest:
    return of_input(no_raw(infer()), shared_memory_region=name, shared_memory_byte_size=size, **more)


def to_region(size: int = 12, name: str = "r", **more: Any) -> pb.ModelInferRequest:
    return of_output(infer(), shared_memory_region=name, shared_memory_byte_size=size, **more)


def trace(model: str = "", **values: list[str]) -> Message:
    message = pb.TraceSettingRequest(model_name=model)
    for name, value in values.items():
        message.settings[name].value.extend(value)
        message.settings[name].SetInParent()
    return message


def log(**values: Any) -> Message:
    message = pb.LogSettingsRequest()
    for name, value in values.items():
        field = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
        setattr(message.settings[name], field, value)
    return message
