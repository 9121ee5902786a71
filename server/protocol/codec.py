"""Protobuf requests to the server's own: with answers.py the only module that knows both, beside the services."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server import datatypes
from convoynet.server.errors import InvalidRequest, Oversize, Unimplemented
from convoynet.server.memory.shared_memory import Regions
from convoynet.server.observing import stage_times
from convoynet.server.spec import ModelSpec
from convoynet.server.types import Call, InferRequest, RequestedOutput, Tensor

_CONTENTS: Mapping[str, tuple[str, str]] = {
    "BOOL": ("bool_contents", "BOOL"),
    "INT8": ("int_contents", "INT32"),
    "INT16": ("int_contents", "INT32"),
    "INT32": ("int_contents", "INT32"),
    "INT64": ("int64_contents", "INT64"),
    "UINT8": ("uint_contents", "UINT32"),
    "UINT16": ("uint_contents", "UINT32"),
    "UINT32": ("uint_contents", "UINT32"),
    "UINT64": ("uint64_contents", "UINT64"),
    "FP32": ("fp32_contents", "FP32"),
    "FP64": ("fp64_contents", "FP64"),
    "BYTES": ("bytes_contents", "BYTES"),
}
"""Where the typed values of a datatype travel, and the datatype that they have there."""
_HELD = dict(_CONTENTS.values())
_PASSED = "triton_enable_empty_final_response"
_NO_PARAMETERS: Mapping[str, int] = {"timeout": 0, "priority": 0, stage_times.PARAMETER: 0}
_KINDS = {
    "priority": ("int64_param", "uint64_param"),
    "timeout": ("int64_param",),
    stage_times.PARAMETER: ("bool_param",),
    "sequence_id": ("int64_param", "uint64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
}
"""The parameters that mean something, and how they may be given. The sequence ones are checked and then ignored, as
Triton does where a model keeps no state."""
MOST = 256
"""The most inputs, outputs or parameters of one request."""
MOST_TEXTS = 2**16
"""The most elements of a BYTES tensor: each becomes an object."""
MOST_TYPED = 2**22
"""The most elements of a tensor that does not travel as raw bytes: each is looked at by itself."""
SHARED_MEMORY_IS_OFF = "shared memory with clients is off on this server; start it with --allow-client-shm"


def request_from_proto(
    message: pb.ModelInferRequest, call: Call, spec: ModelSpec, regions: Regions | None
) -> InferRequest:
    """Decodes a request for the model of that spec.

    The tensors are views of what came: of the payload or the message. Those in the client's shared memory are copied.

    Args:
        message: The request; its raw tensors may have been left in the payload, in `call.raw_inputs`.
        call: How it came.
        spec: Of the model; only looked at to find the clearest words for what is wrong.
        regions: The client's shared memory, None where that is off.

    Raises:
        InvalidRequest: Its tensors are not what it declares, or a parameter is not one that there is.
        Oversize: Its inputs in shared memory have more bytes than may wait for the model.
        UnknownRegion: It names a shared-memory region that is not registered.
        Unimplemented: It names one while shared memory is off.
    """
    if max(len(message.inputs), len(message.outputs), len(message.parameters)) > MOST:
        _check_counts(message, spec)
    parameters = _parameters(message) if message.parameters else _NO_PARAMETERS
    declared: dict[str, str] = {}
    # A slice of what is repeated is a list: its own iterator takes a call of Python for each element.
    inputs = _inputs(message, call.raw_inputs or message.raw_input_contents[:], spec, regions, declared)
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs=inputs,
        datatypes=declared,
        outputs=[_requested(output, regions) for output in message.outputs[:]],
        deadline=call.deadline,
        timeout_us=parameters["timeout"],
        priority=parameters["priority"],
        stage_times=parameters[stage_times.PARAMETER] == 1,
    )


def _check_counts(message: pb.ModelInferRequest, spec: ModelSpec) -> None:
    for what, given, there in (
        ("inputs", message.inputs, spec.inputs),
        ("outputs", message.outputs, spec.outputs),
        ("parameters", message.parameters, ()),
    ):
        if len(given) > MOST and len(given) > len(there):
            raise InvalidRequest(f"a request may have {max(MOST, len(there))} {what}, got {len(given)}")


def _inputs(
    message: pb.ModelInferRequest,
    raw: Sequence[bytes | memoryview],
    spec: ModelSpec,
    regions: Regions | None,
    declared: dict[str, str],
) -> dict[str, Tensor]:
    """The tensors by name; `declared` gets their datatypes."""
    model = message.model_name
    left: Iterator[bytes | memoryview] = iter(raw)
    inputs: dict[str, Tensor] = {}
    for tensor in message.inputs[:]:
        name = tensor.name
        if name in inputs:
            raise InvalidRequest(f"input '{name}' already exists in request")
        declared[name] = tensor.datatype
        typed = tensor.HasField("contents")
        if tensor.parameters and (where := _region(tensor)) is not None:
            if typed:
                raise InvalidRequest(
                    f"unexpected 'content' provided when using shared memory for input tensor '{name}' for model "
                    f"'{model}'"
                )
            inputs[name] = _raw(tensor, _shared(tensor, where, spec, _on(regions), inputs), spec)
        elif raw:
            if typed:
                raise InvalidRequest(
                    "contents field must not be specified when using raw_input_contents for "
                    f"'{name}' for model '{model}'"
                )
            given = next(left, None)
            if given is None:
                raise InvalidRequest(f"unable to find data for input tensor '{name}' for model '{model}' in request.")
            inputs[name] = _raw(tensor, given, spec)
        elif typed or 0 in tensor.shape:
            inputs[name] = _typed(tensor, spec)
        else:
            raise InvalidRequest(f"unable to find data for input tensor '{name}' for model '{model}' in request.")
    if next(left, None) is not None:
        raise InvalidRequest(
            f"expected one entry in raw_input_contents for each input that is not in shared memory, got {len(raw)}, "
            f"{1 + sum(1 for _ in left)} too many"
        )
    return inputs


def _region(
    tensor: pb.ModelInferRequest.InferInputTensor | pb.ModelInferRequest.InferRequestedOutputTensor,
) -> tuple[str, int, int] | None:
    """The region, offset and size that a tensor's parameters name; None where they name none."""
    given = tensor.parameters
    if "shared_memory_region" not in given:
        return None
    values = {}
    for name in ("shared_memory_offset", "shared_memory_byte_size"):
        if name in given and given[name].WhichOneof("parameter_choice") != "int64_param":
            raise InvalidRequest(
                f"invalid value type for '{name}' parameter for tensor '{tensor.name}', expected int64_param."
            )
        values[name] = given[name].int64_param if name in given else 0
    region = given["shared_memory_region"].string_param
    return region, values["shared_memory_offset"], values["shared_memory_byte_size"]


def _on(regions: Regions | None) -> Regions:
    if regions is None:
        raise Unimplemented(SHARED_MEMORY_IS_OFF)
    return regions


def _shared(
    tensor: pb.ModelInferRequest.InferInputTensor,
    where: tuple[str, int, int],
    spec: ModelSpec,
    regions: Regions,
    others: Mapping[str, Tensor],
) -> bytes:
    """The bytes of an input in a region. They are copied: what they come to is checked before memory is taken."""
    name, size, shape = tensor.name, where[2], _shape(tensor)
    regions.check(*where)
    spec.check_input(name, tensor.datatype, shape)
    itemsize = datatypes.itemsize(tensor.datatype)
    if itemsize and min(shape, default=0) >= 0:
        _check_size(tensor, math.prod(shape) * itemsize, size, spec)
    # Those that came in the message have been held against its limit.
    taken = size + sum(each.nbytes for each in others.values())
    if taken > spec.batch.max_queue_bytes:
        raise Oversize(f"the inputs take {taken} bytes; at most {spec.batch.max_queue_bytes} may wait for the model")
    return regions.read(*where)


def _shape(tensor: pb.ModelInferRequest.InferInputTensor) -> list[int]:
    shape: list[int] = tensor.shape[:]
    if len(shape) > datatypes.MAX_RANK:
        raise InvalidRequest(f"input '{tensor.name}' has {len(shape)} dimensions, {datatypes.MAX_RANK} are allowed")
    return shape


def _raw(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | memoryview, spec: ModelSpec) -> Tensor:
    shape = _shape(tensor)
    plain = datatypes.view(tensor.datatype, shape, raw)
    if plain is not None:
        return plain
    # Before anything is made of it; and a wrong shape or datatype is the better reason, as it is Triton's.
    spec.check_input(tensor.name, tensor.datatype, shape)
    try:
        itemsize = datatypes.itemsize(tensor.datatype)
        if min(shape, default=0) >= 0:
            if itemsize:
                _check_size(tensor, math.prod(shape) * itemsize, len(raw), spec)
            else:
                _check_count(tensor, math.prod(shape), MOST_TEXTS)
        return datatypes.decode(tensor.datatype, shape, raw)
    except ValueError as error:
        raise InvalidRequest(f"input '{tensor.name}' for model '{spec.name}': {error}") from error


def _check_count(tensor: pb.ModelInferRequest.InferInputTensor, count: int, most: int) -> None:
    if count > most:
        raise Oversize(f"input '{tensor.name}' has {count} elements, {most} are allowed of such a tensor")


def _check_size(tensor: pb.ModelInferRequest.InferInputTensor, expected: int, got: int, spec: ModelSpec) -> None:
    if expected != got:
        raise InvalidRequest(
            f"input byte size mismatch for input '{tensor.name}' for model '{spec.name}'. Expected {expected}, "
            f"got {got}"
        )


def _typed(tensor: pb.ModelInferRequest.InferInputTensor, spec: ModelSpec) -> Tensor:
    name, datatype, shape = tensor.name, tensor.datatype, _shape(tensor)
    field, held = _CONTENTS.get(datatype, ("", ""))
    for used, _ in tensor.contents.ListFields():
        if used.name != field:
            raise InvalidRequest(
                f"unexpected explicit tensor data for input tensor '{name}' for model '{spec.name}' of type "
                f"'{_HELD[used.name]}', expected datatype '{datatype}'"
            )
    # Before anything is made of the values.
    spec.check_input(name, datatype, shape)
    try:
        dtype = datatypes.numpy_dtype(datatype)
    except ValueError as error:
        raise InvalidRequest(f"input '{name}' for model '{spec.name}': {error}") from error
    values = getattr(tensor.contents, field, ())
    count = math.prod(shape)
    if min(shape, default=0) < 0:
        raise InvalidRequest(f"input '{name}' for model '{spec.name}': shape {shape} has a negative dimension")
    if datatype == "BYTES":
        if len(values) != count:
            raise InvalidRequest(
                f"expected {count} string elements for inference input '{name}' for model '{spec.name}', "
                f"got {len(values)}"
            )
        _check_count(tensor, count, MOST_TEXTS)
        array = np.empty(count, dtype=np.object_)
        array[:] = list(values)
        return _shaped(array, shape, name, spec)
    size = datatypes.itemsize(datatype)
    _check_size(tensor, count * size, len(values) * size, spec)
    _check_count(tensor, count, MOST_TYPED)
    wide: Tensor = np.fromiter(values, datatypes.numpy_dtype(held) if held else dtype, count)
    if wide.dtype != dtype and (wide.astype(dtype) != wide).any():
        raise InvalidRequest(f"input '{name}' holds values that {datatype} cannot")
    return _shaped(wide.astype(dtype, copy=False), shape, name, spec)


def _shaped(flat: Tensor, shape: list[int], name: str, spec: ModelSpec) -> Tensor:
    try:
        return datatypes.shaped(flat, shape)
    except ValueError as error:
        raise InvalidRequest(f"input '{name}' for model '{spec.name}': {error}") from error


def _requested(output: pb.ModelInferRequest.InferRequestedOutputTensor, regions: Regions | None) -> RequestedOutput:
    given = output.parameters
    if not given:
        return RequestedOutput(output.name)
    where = _region(output)
    place = None if where is None else _on(regions).place(*where)
    if "classification" not in given:
        return RequestedOutput(output.name, place=place)
    if place is not None:
        raise InvalidRequest("output can't set both 'shared_memory_region' and 'classification'")
    if given["classification"].WhichOneof("parameter_choice") != "int64_param":
        raise InvalidRequest("invalid value type for 'classification' parameter, expected int64_param")
    classes = given["classification"].int64_param
    if classes < 1:
        raise InvalidRequest("invalid value for 'classification' parameter, expected > 0")
    return RequestedOutput(output.name, classes)


def _parameters(message: pb.ModelInferRequest) -> dict[str, int]:
    """`timeout` (microseconds), `priority`, and whether stage times are asked for; 0 where they are not given."""
    found = dict(_NO_PARAMETERS)
    for name, parameter in message.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        allowed = _KINDS.get(name)
        if name.startswith("triton_") and name != _PASSED:
            raise InvalidRequest(
                "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys "
                f"starting with 'triton_' are allowed: {_PASSED}"
            )
        if kind is None:
            raise InvalidRequest(
                f"invalid value type for '{name}' parameter, expected int64_param, bool_param, or string_param."
            )
        if allowed is not None and kind not in allowed:
            raise InvalidRequest(f"invalid value type for '{name}' parameter, expected {' or '.join(allowed)}.")
        if name in found:
            value = getattr(parameter, kind)
            if value < 0:
                raise InvalidRequest(f"invalid value for '{name}', expected value >= 0.")
            found[name] = value
    return found
