"""Traces as a collector gets them: a gRPC server that speaks OTLP, in this process."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.observing import tracing
from convoynet.server.observing.trace_settings import TraceOptions, TraceSettings
from tests.server.conftest import Serving, code_of, fake_model, infer_request

otlp = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="[otel] is not installed")
otlp_grpc: Any = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")
OTLPSpanExporter: Any = pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter").OTLPSpanExporter

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STAGES = ["decode", "queue", "compute_input", "compute_infer", "compute_output"]
INFER = "inference.GRPCInferenceService/ModelInfer"


class Collector(otlp_grpc.TraceServiceServicer):  # type: ignore[misc]  # generated without types
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Any] = []
        self.resource: dict[str, str] = {}

    async def Export(self, request: Any, context: Any) -> Any:
        """The service's one method."""
        for resource in request.resource_spans:
            self.resource = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return otlp.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Any]:
        """The spans of that name."""
        return [span for span in self.spans if span.name == name]


def attributes(span: Any) -> dict[str, Any]:
    """As a dictionary."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    server, servicer = aio.server(), Collector()
    otlp_grpc.add_TraceServiceServicer_to_server(servicer, server)
    servicer.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield servicer
    await server.stop(None)


async def test_a_request_is_a_span_with_a_child_for_each_stage(
    serving: Serving, tmp_path: Path, collector: Collector
) -> None:
    fake_model(tmp_path, seconds=0.01)
    async with serving(otlp_endpoint=collector.endpoint, trace_rate=0) as running:
        request = infer_request(1, 2)
        request.id = "seven"
        metadata = (("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "vendor=1"))
        await running.stub.ModelInfer(request, metadata=metadata)
        await running.stub.ModelInfer(request, metadata=(("traceparent", f"00-{TRACE}-{SPAN}-00"),))
        await running.stub.ModelInfer(request)
    # Stopping the server sent what was left.
    (root,) = collector.named(INFER)
    assert (root.trace_id.hex(), root.parent_span_id.hex(), root.trace_state) == (TRACE, SPAN, "vendor=1")
    assert root.kind == root.SPAN_KIND_SERVER
    assert root.status.code == root.status.STATUS_CODE_UNSET
    assert attributes(root) == {
        "rpc.system.name": "grpc", "rpc.method": INFER, "rpc.response.status_code": "OK",
        "network.protocol.name": "grpc", "convoy.request.id": "seven", "convoy.model.name": "sum",
        "convoy.model.version": "1", "convoy.rows": 2,
    }  # fmt: skip
    assert collector.resource["service.name"] == "convoy"
    children = sorted((s for s in collector.spans if s is not root), key=lambda s: STAGES.index(s.name))
    assert [s.name for s in children] == STAGES
    assert {(s.trace_id, s.parent_span_id) for s in children} == {(root.trace_id, root.span_id)}
    edges = [root.start_time_unix_nano]
    for child in children:
        edges += [child.start_time_unix_nano, child.end_time_unix_nano]
    assert sorted(edges) == edges
    assert edges[-1] == root.end_time_unix_nano
    (infer,) = collector.named("compute_infer")
    assert infer.end_time_unix_nano - infer.start_time_unix_nano >= 9e6


async def test_without_a_context_the_rate_decides_and_failures_say_whose_fault(
    serving: Serving, tmp_path: Path, collector: Collector
) -> None:
    fake_model(tmp_path, fail_above=5)
    async with serving(otlp_endpoint=collector.endpoint, trace_rate=1) as running:
        await code_of(running.stub.ModelInfer(infer_request(9)))
        await code_of(running.stub.ModelInfer(infer_request(1, model="absent")))
        running.app.traces.update({"trace_rate": ["0"]})
        await running.stub.ModelMetadata(pb.ModelMetadataRequest(name="sum"))
        running.app.traces.update({"trace_rate": ["1"]}, "sum")
        await running.stub.ModelMetadata(pb.ModelMetadataRequest(name="sum"))
        running.app.traces.update({"trace_level": ["OFF"]})
        await running.stub.ModelInfer(infer_request(1))
    assert [s.name for s in collector.spans] == [INFER, INFER, "inference.GRPCInferenceService/ModelMetadata"]
    ours, theirs, metadata = collector.spans
    assert ours.status.code == ours.status.STATUS_CODE_ERROR
    assert attributes(ours)["error.type"] == "INTERNAL"
    assert theirs.status.code == theirs.status.STATUS_CODE_UNSET
    assert attributes(theirs)["error.type"] == attributes(theirs)["rpc.response.status_code"] == "NOT_FOUND"
    assert len({s.trace_id for s in (ours, theirs, metadata)}) == 3
    assert not ours.parent_span_id


async def test_a_faulty_context_is_none(serving: Serving, tmp_path: Path, collector: Collector) -> None:
    fake_model(tmp_path)
    async with serving(otlp_endpoint=collector.endpoint, trace_rate=1) as running:
        await running.stub.ModelInfer(infer_request(1), metadata=(("traceparent", f"00-{'0' * 32}-{SPAN}-00"),))
    (root,) = collector.named(INFER)
    assert root.trace_id.hex() != "0" * 32
    assert not root.parent_span_id


async def test_a_collector_that_is_away_delays_nothing(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for in a thread of its own."""
    monkeypatch.setattr(tracing, "_EXPORT_TIMEOUT_S", 0.5)
    export, waiting = OTLPSpanExporter.export, set()

    def noted(self: Any, spans: Any) -> Any:
        waiting.add(threading.current_thread())
        return export(self, spans)

    monkeypatch.setattr(OTLPSpanExporter, "export", noted)
    fake_model(tmp_path)
    async with serving(otlp_endpoint="http://127.0.0.1:1", trace_rate=1) as running:
        await running.stub.ModelInfer(infer_request(1))
    assert len(waiting) == 1
    assert threading.main_thread() not in waiting


def test_a_count_of_traces_runs_out() -> None:
    settings = TraceSettings(TraceOptions("TIMESTAMPS", 1, 2))
    assert [settings.wants("m", None) for _ in range(4)] == [True, True, False, False]
    assert not settings.wants("m", True)
