"""What the protocol's methods answer, over real gRPC."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from copy import copy
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.datatypes import DATATYPES, numpy_dtype
from convoynet.server.errors import (
    AnswerTooLarge,
    DeadlineExceeded,
    Draining,
    EngineLost,
    InvalidRegion,
    NoStatistics,
    OverBudget,
    QueueFull,
    RegionExists,
    ServerError,
    UnknownModel,
)
from convoynet.server.protocol import codec, wire
from convoynet.server.protocol.dispatch import SERVICE, Dispatcher
from convoynet.server.spec import BatchPolicy, EngineOptions, ModelSpec, TensorSpec
from convoynet.server.status import CODES
from convoynet.server.types import Call
from tests.server.conftest import Serving, code_of, fake_model, infer_request, sums

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


def _wrong(change: Callable[[pb.ModelInferRequest], object]) -> pb.ModelInferRequest:
    message = infer_request(1)
    change(message)
    return message


def _typed(message: pb.ModelInferRequest, *values: float) -> None:
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend(values)


WRONG = {
    "unknown model": (_wrong(lambda m: setattr(m, "model_name", "zz")), NOT_FOUND, "unknown model: 'zz' is not found"),
    "unknown version": (_wrong(lambda m: setattr(m, "model_version", "9")), NOT_FOUND, "'sum' version 9 is not found"),
    "bad version": (_wrong(lambda m: setattr(m, "model_version", "abc")), INVALID, "specified version string 'abc'"),
    "wrong name": (_wrong(lambda m: setattr(m.inputs[0], "name", "zz")), INVALID, "unexpected inference input 'zz'"),
    "no input": (
        _wrong(lambda m: (m.inputs.pop(), m.raw_input_contents.pop())),
        INVALID,
        "expected 1 inputs but got 0",
    ),
    "datatype": (
        _wrong(lambda m: setattr(m.inputs[0], "datatype", "INT32")),
        INVALID,
        "data-type is 'INT32', but model 'sum' expects 'FP32'",
    ),
    "unknown datatype": (
        _wrong(lambda m: setattr(m.inputs[0], "datatype", "FP99")),
        INVALID,
        "data-type is 'FP99'",
    ),
    "shape": (
        _wrong(lambda m: m.inputs[0].shape.__setitem__(slice(None), [1, 2, 2])),
        INVALID,
        r"unexpected shape for input 'x' for model 'sum'. Expected [-1,4], got [1,2,2]",
    ),
    "negative shape": (
        _wrong(lambda m: m.inputs[0].shape.__setitem__(slice(None), [-1, 4])),
        INVALID,
        "negative",
    ),
    "bytes": (
        _wrong(lambda m: m.raw_input_contents.__setitem__(0, b"123")),
        INVALID,
        "input byte size mismatch for input 'x' for model 'sum'. Expected 16, got 3",
    ),
    "batch": (infer_request(*range(9)), INVALID, "inference request batch-size must be <= 8 for 'sum'"),
    "empty batch": (infer_request(), INVALID, "batch-size must be >= 1"),
    "output": (_wrong(lambda m: m.outputs.add(name="zz")), INVALID, "unexpected inference output 'zz'"),
    "output twice": (_wrong(lambda m: [m.outputs.add(name="y") for _ in "ab"]), INVALID, "asked for twice"),
    "both forms": (_wrong(lambda m: m.inputs[0].contents.fp32_contents.append(1)), INVALID, "raw_input_contents"),
    "surplus raw": (_wrong(lambda m: m.raw_input_contents.append(b"")), INVALID, "one entry in raw_input_contents"),
    "too few values": (_wrong(lambda m: _typed(m, 1, 2)), INVALID, "Expected 16, got 8"),
    "reserved": (infer_request(1, triton_x=1), INVALID, "starting with 'triton_' are reserved"),
    "timeout": (
        _wrong(lambda m: setattr(m.parameters["timeout"], "string_param", "soon")),
        INVALID,
        "invalid value type for 'timeout' parameter, expected int64_param.",
    ),
    "classes": (
        _wrong(lambda m: setattr(m.outputs.add(name="y").parameters["classification"], "int64_param", 0)),
        INVALID,
        "invalid value for 'classification' parameter, expected > 0",
    ),
    "shared memory": (
        _wrong(lambda m: setattr(m.inputs[0].parameters["shared_memory_region"], "string_param", "r")),
        grpc.StatusCode.UNIMPLEMENTED,
        "start it with --allow-client-shm",
    ),
}


async def test_wrong_requests_get_the_right_status_and_a_clear_message(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        for case, (message, code, text) in WRONG.items():
            got, details = await code_of(running.stub.ModelInfer(message))
            assert got is code, case
            assert text in details, case
            assert str(tmp_path) not in details
        invalid = running.metric("convoy_requests_total", model="sum", version="1", protocol="grpc", code=INVALID.name)
        nameless = running.metric("convoy_requests_total", model="", version="", protocol="grpc", code=NOT_FOUND.name)
        assert invalid + nameless >= len(WRONG) - 2
        assert running.metric("convoy_queue_depth", model="sum", version="1") == 0


async def test_typed_contents_are_answered_raw(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    message = infer_request(0)
    _typed(message, 1, 2, 3, 4)
    async with serving() as running:
        assert sums(await running.stub.ModelInfer(message)) == [10]


async def test_a_broken_model_is_named_and_the_others_are_served(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    fake_model(tmp_path, "broken")
    (tmp_path / "broken" / "1" / "model.json").write_text("{")
    (tmp_path / "nothing" / "1").mkdir(parents=True)
    async with serving() as running:
        assert set(running.app.core.failed) == {("broken", "1"), ("nothing", "")}
        assert running.metric("convoy_model_load_failed", model="nothing", version="") == 1
        assert "model.json is not JSON" in running.app.core.failed["broken", "1"]
        assert sums(await running.stub.ModelInfer(infer_request(3))) == [3]
        code, _ = await code_of(running.stub.ModelInfer(infer_request(3, model="broken")))
        assert code is grpc.StatusCode.UNAVAILABLE
        ready = {
            name: (await running.stub.ModelReady(pb.ModelReadyRequest(name=name))).ready
            for name in ("sum", "broken", "nothing", "zz")
        }
        assert ready == {"sum": True, "broken": False, "nothing": False, "zz": False}
        health = health_pb2_grpc.HealthStub(running.channel)
        states = {
            name: (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
            for name in ("", "inference.GRPCInferenceService", "sum", "broken")
        }
        assert states == {"": 1, "inference.GRPCInferenceService": 1, "sum": 1, "broken": 2}
        code, _ = await code_of(health.Check(health_pb2.HealthCheckRequest(service="zz")))
        assert code is NOT_FOUND
        assert running.metric("convoy_model_state", model="broken", version="1", state="failed") == 1


async def test_metadata_config_and_statistics(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    fake_model(tmp_path, "other")
    async with serving() as running:
        stub = running.stub
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="sum"))
        assert (metadata.platform, list(metadata.versions)) == ("fake", ["1"])
        assert [list(t.shape) for t in (*metadata.inputs, *metadata.outputs)] == [[-1, 4], [-1, 1]]
        config = (await stub.ModelConfig(pb.ModelConfigRequest(name="sum"))).config
        assert list(config.dynamic_batching.preferred_batch_size) == [8]
        await stub.ModelInfer(infer_request(1, 2, 3))
        await code_of(stub.ModelInfer(infer_request(1, timeout=1)))
        totals = (await stub.ModelStatistics(pb.ModelStatisticsRequest(name="sum"))).model_stats[0]
        assert (totals.inference_count, totals.execution_count) == (3, 1)
        stats = totals.inference_stats
        assert (stats.success.count, stats.fail.count) == (1, 1)
        stages = stats.queue.ns + stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns
        assert 0 < stages <= stats.success.ns
        assert [b.batch_size for b in totals.batch_stats] == [3]
        every = await stub.ModelStatistics(pb.ModelStatisticsRequest())
        assert [m.name for m in every.model_stats] == ["other", "sum"]
        assert (await code_of(stub.ModelStatistics(pb.ModelStatisticsRequest(name="zz"))))[0] is NOT_FOUND


async def test_classification_gives_labels_ties_by_index(serving: Serving, tmp_path: Path) -> None:
    labels = 'output { name: "y" data_type: TYPE_FP32 dims: [3] label_filename: "labels.txt" }\n'
    fake_model(tmp_path)
    path = tmp_path / "sum" / "config.pbtxt"
    path.write_text(path.read_text().replace('output { name: "y" data_type: TYPE_FP32 dims: [1] }\n', labels))
    (tmp_path / "sum" / "labels.txt").write_text("cat\ndog\n")
    message = infer_request(2.5, 1)
    message.outputs.add(name="y").parameters["classification"].int64_param = 5
    async with serving() as running:
        answer = await running.stub.ModelInfer(message)
        assert (answer.outputs[0].datatype, list(answer.outputs[0].shape)) == ("BYTES", [2, 3])
        raw = answer.raw_output_contents[0]
        first = raw[4 : 4 + int.from_bytes(raw[:4], "little")]
        assert first == b"2.500000:0:cat"
        assert raw.endswith(b"1.000000:2")


async def test_reflection_names_the_services(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = [s.name async for r in call for s in r.list_services_response.service]
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(names)


async def test_rpcs_that_are_not_built_say_so() -> None:
    reply = await Dispatcher([]).unary("RepositoryIndex", b"", Call("grpc"))
    assert reply.code is grpc.StatusCode.UNIMPLEMENTED
    assert reply.message == "this server does not implement RepositoryIndex"


async def test_every_rpc_of_the_protocol_is_built(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        assert set(running.app._dispatcher._handlers) == {m.name for m in SERVICE.methods} - {"ModelStreamInfer"}


async def test_triton_metric_names_are_exposed_on_request(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving(metrics_aliases="triton") as running:
        await running.stub.ModelInfer(infer_request(1, 2))
        assert running.metric("nv_inference_count", model="sum", version="1") == 2
        assert running.metric("nv_inference_request_success", model="sum", version="1") == 1


def test_every_error_has_a_status() -> None:
    def below(kind: type[ServerError]) -> set[type[ServerError]]:
        return {kind}.union(*(below(k) for k in kind.__subclasses__()))

    assert set(CODES) == below(ServerError) - {ServerError}


COPIED = {
    AnswerTooLarge: (9, 7),
    OverBudget: (5, 7, 9),
    EngineLost: ("sum",),
    RegionExists: ("r",),
    UnknownModel: ("sum", "3"),
    NoStatistics: ("sum", "3"),
    QueueFull: (0.5,),
    DeadlineExceeded: ("late",),
    Draining: (),
}


@pytest.mark.parametrize("kind", [*CODES, ServerError])
def test_a_copy_of_an_error_says_what_the_error_says(kind: type[ServerError]) -> None:
    error = kind(*COPIED.get(kind, ("why",)))
    for twin in (copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(twin), str(twin), twin.args, vars(twin)) == (kind, str(error), error.args, vars(error))
        assert Dispatcher([]).refusal(twin) == Dispatcher([]).refusal(error) if kind in CODES else True


def test_compatible_statuses_are_tritons_and_a_full_queue_says_when_to_come_back() -> None:
    ours, theirs = Dispatcher([]), Dispatcher([], triton_compat=True)
    full = ours.refusal(QueueFull(drain_s=0.0421))
    assert (full.code.name, full.trailers) == ("RESOURCE_EXHAUSTED", (("grpc-retry-pushback-ms", "43"),))
    assert theirs.refusal(QueueFull()).trailers == (("grpc-retry-pushback-ms", "100"),)
    errors = [QueueFull(), DeadlineExceeded(), NoStatistics("m"), InvalidRegion("x"), UnknownModel("m")]
    codes = [(ours.refusal(e).code.name, theirs.refusal(e).code.name, theirs.refusal(e).message) for e in errors]
    assert codes == [
        ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "Exceeds maximum queue size"),
        ("DEADLINE_EXCEEDED", "UNAVAILABLE", "Request timeout expired"),
        ("NOT_FOUND", "INVALID_ARGUMENT", "requested model 'm' is not available"),
        ("INVALID_ARGUMENT", "INTERNAL", "x"),
        ("NOT_FOUND", "NOT_FOUND", "Request for unknown model: 'm' is not found"),
    ]


async def test_a_full_queue_sends_the_push_back_over_grpc(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, config="max_batch_size: 1\n")
    async with serving(max_queue=1) as running:
        with running.held():
            calls = [running.stub.ModelInfer(infer_request(1)) for _ in range(4)]
            while not running.metric("convoy_rejected_total", model="sum", version="1", reason="queue_full"):
                await asyncio.sleep(0.002)
        codes = [(await code_of(call))[0] for call in calls]
        refused = [c for c, code in zip(calls, codes, strict=True) if code is grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert refused
        for call in refused:
            assert ("grpc-retry-pushback-ms", "100") in [*await call.trailing_metadata()]


@pytest.mark.parametrize("datatype", sorted(set(DATATYPES) - {"FP16", "BF16", "BYTES"}))
def test_typed_contents_are_the_same_tensor_as_raw_ones(datatype: str) -> None:
    dtype = numpy_dtype(datatype)
    values = np.array([[1, 0, 1]], dtype)
    field, _ = codec._CONTENTS[datatype]
    tensors = []
    for raw in (True, False):
        message = pb.ModelInferRequest(model_name="m")
        tensor = message.inputs.add(name="x", datatype=datatype, shape=[1, 3])
        if raw:
            message.raw_input_contents.append(values.tobytes())
        else:
            getattr(tensor.contents, field).extend(values.ravel().tolist())
        tensors.append(codec._inputs(message, message.raw_input_contents, _spec(datatype), None, {})["x"])
    assert tensors[0].dtype == tensors[1].dtype == dtype
    assert tensors[0].tolist() == tensors[1].tolist() == values.tolist()


def _spec(datatype: str) -> ModelSpec:
    tensor = TensorSpec("x", datatype, numpy_dtype(datatype), (3,))
    return ModelSpec(
        *("m", "1", "fake", (tensor,), (tensor,), {}, BatchPolicy(8, 0, 8)),
        *(EngineOptions("fake", Path(), "cpu", 1), 1, (), None),
    )


async def test_raw_tensors_are_views_of_the_payload(serving: Serving, tmp_path: Path) -> None:
    large = 'max_batch_size: 8\ninput { name: "x" data_type: TYPE_FP32 dims: [65536] }\n'
    fake_model(tmp_path)
    path = tmp_path / "sum" / "config.pbtxt"
    path.write_text(large + 'backend: "fake"\noutput { name: "y" data_type: TYPE_FP32 dims: [1] }\n')
    message = pb.ModelInferRequest(model_name="sum", raw_input_contents=[np.ones(65536, np.float32).tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 65536])
    plain, raw = wire.taken_apart(payload := message.SerializeToString(), pb.ModelInferRequest.DESCRIPTOR)
    assert raw[0].obj is payload
    assert not pb.ModelInferRequest.FromString(plain).raw_input_contents
    async with serving() as running:
        assert sums(await running.stub.ModelInfer(message)) == [65536]
        del message.raw_input_contents[:]
        message.inputs[0].contents.fp32_contents.extend([2] * 65536)
        assert sums(await running.stub.ModelInfer(message)) == [131072]


async def test_large_outputs_arrive_whole(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    path = tmp_path / "sum" / "config.pbtxt"
    path.write_text(path.read_text().replace("TYPE_FP32 dims: [1]", "TYPE_FP32 dims: [100, 100]"))
    async with serving() as running:
        answer = await running.stub.ModelInfer(infer_request(1, 2, 3))
        values = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(3, 100, 100)
        assert [(row.min(), row.max()) for row in values] == [(1, 1), (2, 2), (3, 3)]
        streamed = await running.stub.ModelStreamInfer(iter([infer_request(1, 2, 3)])).read()
        assert streamed.infer_response.raw_output_contents == answer.raw_output_contents
