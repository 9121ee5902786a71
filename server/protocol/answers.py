"""Answers, metadata and statistics of a model as protobuf messages."""

from __future__ import annotations

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server import datatypes
from convoynet.server.errors import InvalidRegion
from convoynet.server.models.servable import Servable
from convoynet.server.observing import stage_times
from convoynet.server.observing.statistics import Duration
from convoynet.server.protocol import wire
from convoynet.server.protocol.classification import classify
from convoynet.server.spec import ModelSpec, TensorSpec
from convoynet.server.types import InferRequest, InferResult, Place, RequestedOutput


def proto_from_result(
    result: InferResult, request: InferRequest, spec: ModelSpec, raw_outputs: list[bytes | memoryview] | None = None
) -> pb.ModelInferResponse:
    """Encodes an answer: the outputs that were asked for, in that order, or all of them, always as raw bytes.

    An output that goes to shared memory is written there; its raw bytes in the message are empty.

    Args:
        result: The answer.
        request: What it answers.
        spec: Of the model.
        raw_outputs: Gets the raw bytes in place of the message where they are large; None to have them in it.

    Raises:
        InvalidRequest: Classes were asked of an output that has none.
        InvalidRegion: An output is larger than the place that the client has for it.
    """
    response = pb.ModelInferResponse(model_name=result.model, model_version=result.version, id=request.id)
    declared = spec.output_types
    raw: list[bytes | memoryview] = []
    written: list[tuple[str, object, int, int]] = []
    for asked in request.outputs or [RequestedOutput(name) for name in result.outputs]:
        array = result.outputs[asked.name]
        datatype = declared[asked.name]
        if asked.classes:
            labels = spec.labels.get(asked.name, ())
            array = classify(array, datatype, asked.classes, labels, batched=bool(spec.batch.max_rows))
            datatype = "BYTES"
        response.outputs.add(name=asked.name, datatype=datatype, shape=array.shape)
        data = datatypes.buffer(array, datatype)
        if asked.place is not None:
            _put(data, asked.name, asked.place, written)
            data = b""
        raw.append(data)
    if raw_outputs is not None and sum(map(len, raw)) >= wire.APART_FROM:
        raw_outputs.extend(raw)
    else:
        response.raw_output_contents.extend([bytes(each) for each in raw])
    for name, microseconds in stage_times.reply_parameters(result.timings).items() if request.stage_times else ():
        response.parameters[name].int64_param = microseconds
    return response


def _put(data: bytes | memoryview, name: str, place: Place, written: list[tuple[str, object, int, int]]) -> None:
    """Writes an output to the client's shared memory; `written` has those before it, and gets it as well."""
    if len(data) > place.size:
        raise InvalidRegion(
            f"shared memory size specified with the request for output '{name}' ({place.size} bytes) should be at "
            f"least {len(data)} bytes to hold the results"
        )
    memory, first = place.where
    end = first + len(data)
    if other := next((n for n, m, begin, until in written if m == memory and first < until and begin < end), None):
        raise InvalidRegion(
            f"output '{name}' would overwrite output '{other}' in shared memory: give each its own place"
        )
    written.append((name, memory, first, end))
    place.write(data)


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
            cache_hit=duration(totals.cache_hit),
            cache_miss=duration(totals.cache_miss),
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
