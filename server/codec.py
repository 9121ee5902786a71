"""Protobuf messages to and from the server's own types: the only module that knows both, beside service.py."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from protos.inference import grpc_service_pb2 as pb
from server import datatypes, stage_times
from server.errors import InvalidRequest
from server.servable import Servable
from server.spec import ModelSpec, TensorSpec
from server.statistics import Duration
from server.types import Call, InferRequest, InferResult, RequestedOutput, Tensor

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def request_from_proto(message: pb.ModelInferRequest, call: Call) -> InferRequest:
    """Decodes a request.

    Raises:
        InvalidRequest: Its tensors are not what it declares, or a parameter is not one that there is.
    """
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequest(
            f"expected one entry in raw_input_contents for each of {len(message.inputs)} inputs, got {len(raw)}"
        )
    inputs: dict[str, Tensor] = {}
    declared: dict[str, str] = {}
    for i, tensor in enumerate(message.inputs):
        if tensor.name in inputs:
            raise InvalidRequest(f"input '{tensor.name}' is given twice")
        if raw and tensor.HasField("contents"):
            raise InvalidRequest(
                f"contents field must not be specified when using raw_input_contents for '{tensor.name}' "
                f"for model '{message.model_name}'"
            )
        data = raw[i] if raw else None
        inputs[tensor.name] = _tensor(tensor, data, message.model_name)
        declared[tensor.name] = tensor.datatype
    parameters = _parameters(message)
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs=inputs,
        datatypes=declared,
        outputs=tuple(_requested(o) for o in message.outputs),
        deadline=call.deadline,
        timeout_us=parameters["timeout"],
        priority=parameters["priority"],
        stage_times=parameters[stage_times.PARAMETER] == 1,
    )


def _tensor(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, model: str) -> Tensor:
    shape = list(tensor.shape)
    if len(shape) > datatypes.MAX_RANK:
        raise InvalidRequest(f"input '{tensor.name}' has {len(shape)} dimensions, {datatypes.MAX_RANK} are allowed")
    if "shared_memory_region" in tensor.parameters:
        raise InvalidRequest(f"input '{tensor.name}' names a shared-memory region; this server has none")
    try:
        if raw is None:
            return _typed(tensor, shape, model)
        itemsize = datatypes.itemsize(tensor.datatype)
        expected = math.prod(shape) * itemsize
        if itemsize and min(shape, default=0) >= 0 and expected != len(raw):
            raise InvalidRequest(
                f"input byte size mismatch for input '{tensor.name}' for model '{model}'. Expected {expected}, "
                f"got {len(raw)}"
            )
        return datatypes.decode(tensor.datatype, shape, raw)
    except ValueError as error:
        raise InvalidRequest(f"input '{tensor.name}' for model '{model}': {error}") from error


def _typed(tensor: pb.ModelInferRequest.InferInputTensor, shape: list[int], model: str) -> Tensor:
    dtype = datatypes.numpy_dtype(tensor.datatype)
    if tensor.datatype not in _CONTENTS:
        raise InvalidRequest(f"input '{tensor.name}' is {tensor.datatype}, which travels in raw_input_contents only")
    used = [field.name for field, _ in tensor.contents.ListFields()]
    field = _CONTENTS[tensor.datatype]
    if used and used != [field]:
        raise InvalidRequest(f"input '{tensor.name}' is {tensor.datatype} and needs {field}, got {', '.join(used)}")
    values = getattr(tensor.contents, field)
    if min(shape, default=0) < 0 or len(values) != math.prod(shape):
        raise InvalidRequest(
            f"unable to find data for input '{tensor.name}' for model '{model}' in request: shape {shape} needs "
            f"{math.prod(shape)} elements, got {len(values)}"
        )
    if tensor.datatype == "BYTES":
        array = np.empty(len(values), dtype=np.object_)
        array[:] = list(values)
        return array.reshape(shape)
    wide: Tensor = np.array(values)
    if dtype.kind in "iu" and (wide.astype(dtype) != wide).any():
        raise InvalidRequest(f"input '{tensor.name}' holds values that {tensor.datatype} cannot")
    return wide.astype(dtype).reshape(shape)


def _requested(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> RequestedOutput:
    parameters = output.parameters
    if not parameters:
        return RequestedOutput(output.name)
    if "shared_memory_region" in parameters:
        raise InvalidRequest(f"output '{output.name}' names a shared-memory region; this server has none")
    if "classification" not in parameters:
        return RequestedOutput(output.name)
    parameter = parameters["classification"]
    if parameter.WhichOneof("parameter_choice") != "int64_param" or parameter.int64_param < 1:
        raise InvalidRequest(
            f"parameter 'classification' of output '{output.name}' must be an int64 of at least 1, got "
            f"{_value(parameter)!r}"
        )
    return RequestedOutput(output.name, parameter.int64_param)


def _value(parameter: pb.InferParameter) -> object:
    return getattr(parameter, parameter.WhichOneof("parameter_choice") or "", None)


def _parameters(message: pb.ModelInferRequest) -> dict[str, int]:
    """`timeout` (microseconds), `priority`, and whether stage times are asked for; 0 where they are not given."""
    found = {"timeout": 0, "priority": 0, stage_times.PARAMETER: 0}
    for name, parameter in message.parameters.items():
        value = _value(parameter)
        if name.startswith("triton_") and name != "triton_enable_empty_final_response":
            raise InvalidRequest(f"parameter '{name}' is reserved: names must not begin with 'triton_'")
        if name == stage_times.PARAMETER:
            if not isinstance(value, bool):
                raise InvalidRequest(f"parameter '{name}' must be a bool, got {value!r}")
            found[name] = value
        elif name in found:
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InvalidRequest(f"parameter '{name}' must be an integer of at least 0, got {value!r}")
            found[name] = value
    return found


def proto_from_result(result: InferResult, request: InferRequest, spec: ModelSpec) -> pb.ModelInferResponse:
    """Encodes an answer: the outputs that were asked for, in that order, or all of them, always as raw bytes.

    Raises:
        InvalidRequest: Classes were asked of an output that has none.
    """
    response = pb.ModelInferResponse(model_name=result.model, model_version=result.version, id=request.id)
    declared = {t.name: t.datatype for t in spec.outputs}
    for asked in request.outputs or [RequestedOutput(name) for name in result.outputs]:
        array = result.outputs[asked.name]
        datatype = declared[asked.name]
        if asked.classes:
            array = classify(array, asked.classes, spec.labels.get(asked.name, ()), bool(spec.batch.max_rows))
            datatype = "BYTES"
        response.outputs.add(name=asked.name, datatype=datatype, shape=array.shape)
        response.raw_output_contents.append(datatypes.encode(array, datatype))
    for name, microseconds in stage_times.reply_parameters(result.timings).items() if request.stage_times else ():
        response.parameters[name].int64_param = microseconds
    return response


def classify(array: Tensor, classes: int, labels: Iterable[str], batched: bool) -> Tensor:
    """The top classes of an output as text, the protocol's classification extension.

    Args:
        array: Scores, [rows, ...] where batched, else [...]; what follows the batch axis counts as one list.
        classes: How many to give, fewer where there are fewer.
        labels: Name of class n at position n; may be shorter than the scores.
        batched: Whether the first axis is the batch.

    Returns:
        BYTES [rows, k] or [k]: `<score>:<index>[:<label>]`, best first, ties by the lower index, NaN last.

    Raises:
        InvalidRequest: The output's datatype has no order.
    """
    if array.dtype.kind not in "iuf":
        raise InvalidRequest("class result not available for output due to unsupported type 'BYTES' or 'BOOL'")
    names = list(labels)
    scores = array.reshape(len(array) if batched else 1, -1)
    # A stable sort of the negated scores gives ties to the lower index; NaN sorts last by itself.
    keys = -scores.astype(np.float64)
    order = np.argsort(keys, axis=1, kind="stable")[:, :classes]
    form = "{:.6f}" if scores.dtype.kind == "f" else "{}"
    rows = [
        [(f"{form.format(row[i])}:{i}" + (f":{names[i]}" if i < len(names) else "")).encode() for i in map(int, top)]
        for row, top in zip(scores, order, strict=True)
    ]
    text = np.array(rows, dtype=np.object_).reshape(order.shape)
    return text if batched else text[0]


def metadata_to_proto(spec: ModelSpec, versions: list[str]) -> pb.ModelMetadataResponse:
    """What the protocol calls the metadata of a model: shapes with the batch axis as -1."""

    def tensors(specs: tuple[TensorSpec, ...]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
        return [
            pb.ModelMetadataResponse.TensorMetadata(name=t.name, datatype=t.datatype, shape=spec.shape(t))
            for t in specs
        ]

    return pb.ModelMetadataResponse(
        name=spec.name,
        versions=versions,
        platform=spec.platform,
        inputs=tensors(spec.inputs),
        outputs=tensors(spec.outputs),
    )


def statistics_to_proto(model: Servable) -> pb.ModelStatistics:
    """The totals of one version since it was loaded."""
    totals = model.statistics

    def duration(part: Duration) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=part.count, ns=part.ns)

    return pb.ModelStatistics(
        name=model.spec.name,
        version=model.spec.version,
        last_inference=totals.last_inference_ms,
        inference_count=totals.inferences,
        execution_count=totals.executions,
        inference_stats=pb.InferStatistics(
            success=duration(totals.success),
            fail=duration(totals.fail),
            queue=duration(totals.queue),
            compute_input=duration(totals.input),
            compute_infer=duration(totals.infer),
            compute_output=duration(totals.output),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=rows,
                compute_input=duration(part.input),
                compute_infer=duration(part.infer),
                compute_output=duration(part.output),
            )
            for rows, part in sorted(totals.batches.items())
        ],
    )
