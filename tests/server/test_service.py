"""What the protocol's methods answer, over real gRPC."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.inference import grpc_service_pb2 as pb
from server.errors import ServerError
from server.status import CODES
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
        "unknown datatype 'FP99'",
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
    "too few values": (_wrong(lambda m: _typed(m, 1, 2)), INVALID, "needs 4 elements, got 2"),
    "reserved": (infer_request(1, triton_x=1), INVALID, "'triton_x' is reserved"),
    "timeout": (
        _wrong(lambda m: setattr(m.parameters["timeout"], "string_param", "soon")),
        INVALID,
        "'timeout' must be an integer of at least 0, got 'soon'",
    ),
    "classes": (
        _wrong(lambda m: setattr(m.outputs.add(name="y").parameters["classification"], "int64_param", 0)),
        INVALID,
        "must be an int64 of at least 1, got 0",
    ),
    "shared memory": (
        _wrong(lambda m: setattr(m.inputs[0].parameters["shared_memory_region"], "string_param", "r")),
        INVALID,
        "this server has none",
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
        assert invalid + nameless >= len(WRONG) - 1
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
    (tmp_path / "nothing").mkdir()
    async with serving() as running:
        assert set(running.app.core.failed) == {("broken", "1"), ("nothing", "")}
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


async def test_rpcs_that_are_not_built_say_so(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        code, _ = await code_of(running.stub.RepositoryIndex(pb.RepositoryIndexRequest()))
        assert code is grpc.StatusCode.UNIMPLEMENTED


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


@pytest.mark.parametrize("batched", [True, False])
def test_classification_puts_nan_last(batched: bool) -> None:
    from server.codec import classify

    scores = np.array([[1, np.nan, 3, 1]], np.float16)
    text = classify(scores if batched else scores[0], 4, (), batched)
    assert [t.split(b":")[1] for t in text.ravel()] == [b"2", b"0", b"3", b"1"]
