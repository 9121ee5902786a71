"""Endpoints of HTTP to RPCs and back, without a network and without models."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidRequest,
    NotPermitted,
    QueueFull,
    Unauthenticated,
    Unimplemented,
    UnknownModel,
)
from convoynet.server.http import json_tensors
from convoynet.server.http.api import STATUS, answer, route
from convoynet.server.http.handlers import HttpReply, HttpRequest
from convoynet.server.protocol.dispatch import SERVICE, Dispatcher, Reply
from convoynet.server.status import CODES
from convoynet.server.types import Call


class Recorder:
    """Answers every RPC with a message of its own type, and keeps what was asked."""

    def __init__(self, **answers: Message | Exception) -> None:
        self.asked: list[tuple[str, Any]] = []
        self._answers = answers

    async def message(self, rpc: str, request: Message, call: Call) -> Message:
        self.asked.append((rpc, request))
        given = self._answers.get(rpc)
        if isinstance(given, Exception):
            raise given
        return given or getattr(pb, f"{rpc}Response")()

    def check(self, rpc: str, call: Call) -> None:
        pass

    def refusal(self, error: Exception, request: Message | None = None) -> Reply:
        return Dispatcher(()).refusal(error, request)


async def send(recorder: Recorder, method: str, path: str, document: object = None, **headers: str) -> HttpReply:
    """The answer to one request; `document` may be bytes."""
    body = document if isinstance(document, bytes) else b"" if document is None else json.dumps(document).encode()
    path, _, query = path.partition("?")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await routed(HttpRequest(method, path, query, named, body), recorder)


async def routed(request: HttpRequest, recorder: Recorder) -> HttpReply:
    """The answer of what the request's path is for."""
    to = route(request.method, request.path)
    return to if isinstance(to, HttpReply) else await answer(request, to, Call("http"), recorder)


def shown(reply: HttpReply) -> Any:
    """The JSON of an answer."""
    return json.loads(b"".join(reply.body))


MODEL = {"name": "a/b", "version": "3"}
ENDPOINTS: dict[str, tuple[str, object, str, Message]] = {
    "GET /v2": ("GET", None, "ServerMetadata", pb.ServerMetadataRequest()),
    "GET /v2/health/live": ("GET", None, "ServerLive", pb.ServerLiveRequest()),
    "GET /v2/health/ready": ("GET", None, "ServerReady", pb.ServerReadyRequest()),
    "GET /v2/models/a%2Fb/versions/3": ("GET", None, "ModelMetadata", pb.ModelMetadataRequest(**MODEL)),
    "GET /v2/models/a%2Fb": ("GET", None, "ModelMetadata", pb.ModelMetadataRequest(name="a/b")),
    "GET /v2/models/a%2Fb/versions/3/ready": ("GET", None, "ModelReady", pb.ModelReadyRequest(**MODEL)),
    "GET /v2/models/a%2Fb/versions/3/config": ("GET", None, "ModelConfig", pb.ModelConfigRequest(**MODEL)),
    "GET /v2/models/a%2Fb/versions/3/stats": ("GET", None, "ModelStatistics", pb.ModelStatisticsRequest(**MODEL)),
    "GET /v2/models/stats": ("GET", None, "ModelStatistics", pb.ModelStatisticsRequest()),
    "POST /v2/repository/index": ("POST", None, "RepositoryIndex", pb.RepositoryIndexRequest()),
    "POST /v2/repository/r/index": (
        "POST",
        {"ready": True},
        "RepositoryIndex",
        pb.RepositoryIndexRequest(repository_name="r", ready=True),
    ),
    "POST /v2/repository/models/m/load": (
        "POST",
        {"parameters": {"config": "{}", "file:1/model.onnx": base64.b64encode(b"\0\1").decode()}},
        "RepositoryModelLoad",
        pb.RepositoryModelLoadRequest(
            model_name="m",
            parameters={
                "config": pb.ModelRepositoryParameter(string_param="{}"),
                "file:1/model.onnx": pb.ModelRepositoryParameter(bytes_param=b"\0\1"),
            },
        ),
    ),
    "POST /v2/repository/models/m/unload": (
        "POST",
        {"parameters": {"unload_dependents": True}},
        "RepositoryModelUnload",
        pb.RepositoryModelUnloadRequest(
            model_name="m", parameters={"unload_dependents": pb.ModelRepositoryParameter(bool_param=True)}
        ),
    ),
    "GET /v2/systemsharedmemory/status": (
        "GET", None, "SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()
    ),
    "GET /v2/systemsharedmemory/region/r/status": (
        "GET", None, "SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(name="r")
    ),
    "POST /v2/systemsharedmemory/region/r/register": (
        "POST",
        {"key": "/k", "offset": 1, "byte_size": 2},
        "SystemSharedMemoryRegister",
        pb.SystemSharedMemoryRegisterRequest(name="r", key="/k", offset=1, byte_size=2),
    ),
    "POST /v2/systemsharedmemory/unregister": (
        "POST", None, "SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest()
    ),
    "POST /v2/systemsharedmemory/region/r/unregister": (
        "POST", None, "SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name="r")
    ),
    "GET /v2/cudasharedmemory/status": ("GET", None, "CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest()),
    "POST /v2/cudasharedmemory/region/r/register": (
        "POST",
        {"raw_handle": {"b64": "AAE="}, "device_id": 1, "byte_size": 2},
        "CudaSharedMemoryRegister",
        pb.CudaSharedMemoryRegisterRequest(name="r", raw_handle=b"\0\1", device_id=1, byte_size=2),
    ),
    "POST /v2/cudasharedmemory/unregister": (
        "POST", None, "CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest()
    ),
    "GET /v2/trace/setting": ("GET", None, "TraceSetting", pb.TraceSettingRequest()),
    "POST /v2/models/m/trace/setting": (
        "POST",
        {"trace_level": ["TIMESTAMPS"], "trace_rate": "5", "trace_count": None},
        "TraceSetting",
        pb.TraceSettingRequest(
            model_name="m",
            settings={
                "trace_level": pb.TraceSettingRequest.SettingValue(value=["TIMESTAMPS"]),
                "trace_rate": pb.TraceSettingRequest.SettingValue(value=["5"]),
                "trace_count": pb.TraceSettingRequest.SettingValue(),
            },
        ),
    ),
    "GET /v2/logging": ("GET", None, "LogSettings", pb.LogSettingsRequest()),
    "POST /v2/logging": (
        "POST",
        {"log_info": False, "log_verbose_level": 1, "log_format": "ISO8601"},
        "LogSettings",
        pb.LogSettingsRequest(
            settings={
                "log_info": pb.LogSettingsRequest.SettingValue(bool_param=False),
                "log_verbose_level": pb.LogSettingsRequest.SettingValue(uint32_param=1),
                "log_format": pb.LogSettingsRequest.SettingValue(string_param="ISO8601"),
            }
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_an_endpoint_is_its_rpc(endpoint: str) -> None:
    method, document, rpc, message = ENDPOINTS[endpoint]
    recorder = Recorder()
    reply = await send(recorder, method, endpoint.split()[1], document)
    assert recorder.asked == [(rpc, message)]
    assert reply.status == (503 if rpc in ("ServerLive", "ServerReady", "ModelReady") else 200)


def test_every_unary_rpc_has_an_endpoint() -> None:
    reached = {rpc for _, _, rpc, _ in ENDPOINTS.values()} | {"ModelInfer"}
    assert reached == {rpc.name for rpc in SERVICE.methods if not rpc.server_streaming}


async def test_up_is_200_and_down_is_503() -> None:
    for up, status in ((True, 200), (False, 503)):
        recorder = Recorder(ModelReady=pb.ModelReadyResponse(ready=up))
        reply = await send(recorder, "GET", "/v2/models/m/ready")
        assert (reply.status, shown(reply)) == (status, {"ready": up})


async def test_answers_have_the_shapes_that_clients_expect() -> None:
    recorder = Recorder(
        RepositoryIndex=pb.RepositoryIndexResponse(
            models=[pb.RepositoryIndexResponse.ModelIndex(name="m", version="1", state="READY")]
        ),
        SystemSharedMemoryStatus=pb.SystemSharedMemoryStatusResponse(
            regions={"r": pb.SystemSharedMemoryStatusResponse.RegionStatus(name="r", key="/k", byte_size=2**40)}
        ),
        TraceSetting=pb.TraceSettingResponse(
            settings={
                "trace_level": pb.TraceSettingResponse.SettingValue(value=["OFF"]),
                "trace_rate": pb.TraceSettingResponse.SettingValue(value=["1000"]),
            }
        ),
        LogSettings=pb.LogSettingsResponse(
            settings={
                "log_info": pb.LogSettingsResponse.SettingValue(bool_param=True),
                "log_verbose_level": pb.LogSettingsResponse.SettingValue(uint32_param=0),
            }
        ),
    )
    index = await send(recorder, "POST", "/v2/repository/index")
    assert shown(index) == [{"name": "m", "version": "1", "state": "READY", "reason": ""}]
    regions = await send(recorder, "GET", "/v2/systemsharedmemory/status")
    assert shown(regions) == [{"name": "r", "key": "/k", "offset": 0, "byte_size": 2**40}]
    assert shown(await send(recorder, "GET", "/v2/trace/setting")) == {"trace_level": ["OFF"], "trace_rate": "1000"}
    assert shown(await send(recorder, "GET", "/v2/logging")) == {"log_info": True, "log_verbose_level": 0}


def test_every_status_of_the_server_has_one_in_http() -> None:
    assert set(CODES.values()) <= set(STATUS)


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (InvalidRequest("no"), 400, None),
        (Unauthenticated("no"), 401, ("www-authenticate", "Bearer")),
        (NotPermitted("no"), 403, None),
        (UnknownModel("m"), 404, None),
        (QueueFull(), 429, ("retry-after", "1")),
        (EngineFailed("no"), 500, None),
        (Unimplemented("no"), 501, None),
        (Draining(), 503, None),
        (DeadlineExceeded(), 504, None),
    ],
)
async def test_errors_are_json_with_the_right_status(
    error: Exception, status: int, header: tuple[str, str] | None
) -> None:
    reply = await send(Recorder(ModelConfig=error), "GET", "/v2/models/m/config")
    assert (reply.status, shown(reply)) == (status, {"error": str(error)})
    assert header is None or header in reply.headers


async def test_a_bug_is_500_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    reply = await send(Recorder(ModelConfig=KeyError("/secret/path")), "GET", "/v2/models/m/config")
    assert (reply.status, shown(reply)) == (500, {"error": "internal error; the server's log has the details"})
    assert "a bug in the server" in caplog.text


async def test_a_request_error_names_the_request() -> None:
    document = {"id": "7", "inputs": []}
    reply = await send(Recorder(ModelInfer=InvalidRequest("no")), "POST", "/v2/models/m/infer", document)
    assert shown(reply) == {"error": "[request id: 7] no"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/models/m/versions/1/zz", 404),
        ("GET", "/v2/models//infer", 404),
        ("GET", "/v2/models/m/infer", 405),
        ("DELETE", "/v2/models/m", 405),
        ("GET", "/v2/models/%ff", 400),
        ("GET", "/v2/models/%zz", 400),
        ("GET", "/v2/models/a%2", 400),
        ("GET", "//v2", 404),
        ("GET", "/v2/models/m/../n", 404),
        ("OPTIONS", "/v2/models/m/infer", 405),
        ("TRACE", "/v2", 405),
        ("HEAD", "/v2/models/m/infer", 405),
    ],
)
async def test_other_paths_and_methods_are_refused(method: str, path: str, status: int) -> None:
    recorder = Recorder()
    reply = await send(recorder, method, path)
    assert (reply.status, recorder.asked) == (status, [])
    assert set(shown(reply)) == {"error"}


@pytest.mark.parametrize(
    ("path", "document", "text"),
    [
        ("/v2/repository/index", {"ready": 1}, "'ready' must be true or false"),
        ("/v2/repository/models/m/load", {"parameters": {"file:1/x": "*"}}, "'file:1/x' must be a text in base64"),
        ("/v2/repository/models/m/load", {"parameters": 3}, "'parameters' must be an object"),
        ("/v2/repository/models/m/unload", {"parameters": {"a": []}}, "parameter 'a' must be"),
        ("/v2/systemsharedmemory/region/r/register", {"key": "k"}, "'byte_size' must be an integer of 0 to 2^63-1"),
        ("/v2/systemsharedmemory/region/r/register", {"byte_size": 2**63}, "'key' must be a text"),
        ("/v2/cudasharedmemory/region/r/register", {}, "'raw_handle' must be a text in base64"),
        ("/v2/trace/setting", {"trace_level": [[1]]}, "trace setting 'trace_level' must be"),
        ("/v2/logging", {"log_info": None}, "log setting 'log_info' must be"),
        ("/v2/logging", {"log_verbose_level": 2**32}, "log setting 'log_verbose_level' must be"),
    ],
)
async def test_wrong_documents_are_refused(path: str, document: object, text: str) -> None:
    recorder = Recorder()
    reply = await send(recorder, "POST", path, document)
    assert (reply.status, recorder.asked) == (400, [])
    assert text in shown(reply)["error"]


def _metadata(*shape: int) -> pb.ModelMetadataResponse:
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        inputs=[tensor(name="x", datatype="UINT8", shape=shape)], outputs=[tensor(name="y", datatype="FP32")]
    )


async def test_head_is_get() -> None:
    for path in ("/v2", "/v2/health/ready", "/v2/models/m/ready", "/v2/models/m/config"):
        get, head = Recorder(), Recorder()
        assert await send(head, "HEAD", path) == await send(get, "GET", path)
        assert head.asked == get.asked


async def test_an_image_is_one_bytes_input_with_classes_on_request() -> None:
    recorder = Recorder(ModelMetadata=_metadata(-1, 8, 8, 3))
    path = "/v2/models/m/versions/2/infer?classification=5"
    assert (await send(recorder, "POST", path, b"JFIF", content_type="image/jpeg")).status == 200
    (_, metadata), (rpc, infer) = recorder.asked
    assert (metadata.name, metadata.version, rpc) == ("m", "2", "ModelInfer")
    assert (infer.inputs[0].name, infer.inputs[0].datatype, list(infer.inputs[0].shape)) == ("x", "BYTES", [1])
    assert infer.raw_input_contents[0] == b"\4\0\0\0JFIF"
    assert infer.outputs[0].parameters["classification"].int64_param == 5
    reply = await send(recorder, "POST", "/v2/models/m/infer?classification=x", b"JFIF", content_type="image/jpeg")
    assert (reply.status, shown(reply)["error"]) == (400, "'classification' in the query must be a number, got 'x'")


async def test_a_raw_body_is_one_row_of_the_one_input() -> None:
    recorder = Recorder(ModelMetadata=_metadata(-1, 2))
    header = {"inference_header_content_length": "0"}
    assert (await send(recorder, "POST", "/v2/models/m/infer", b"\1\2", **header)).status == 200
    infer = recorder.asked[-1][1]
    assert (list(infer.inputs[0].shape), infer.raw_input_contents[0]) == ([1, 2], b"\1\2")
    for metadata, text in (
        (_metadata(-1, -1), "of any size"),
        (pb.ModelMetadataResponse(), "needs a model with 1 input"),
    ):
        reply = await send(Recorder(ModelMetadata=metadata), "POST", "/v2/models/m/infer", b"\1", **header)
        assert text in shown(reply)["error"]


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 19, "", "0x10", "99"])
async def test_wrong_header_lengths_are_refused(length: str) -> None:
    recorder = Recorder()
    reply = await send(recorder, "POST", "/v2/models/m/infer", {}, inference_header_content_length=length)
    assert (reply.status, recorder.asked) == (400, [])
    assert "Inference-Header-Content-Length" in shown(reply)["error"]


async def test_binary_answers_say_where_the_json_ends() -> None:
    response = pb.ModelInferResponse(model_name="m", raw_output_contents=[b"\1\2"])
    response.outputs.add(name="y", datatype="UINT8", shape=[2])
    document = {"inputs": [], "parameters": {"binary_data_output": True}}
    reply = await send(Recorder(ModelInfer=response), "POST", "/v2/models/m/infer", document)
    length = int(dict(reply.headers)["inference-header-content-length"])
    body = b"".join(reply.body)
    assert json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 2}
    assert body[length:] == b"\1\2"
    assert dict(reply.headers)["content-type"] == "application/octet-stream"


PATHS = st.sampled_from([e.split()[1] for e in ENDPOINTS] + ["/v2/models/m/infer"]) | st.text("/v2modelsinfr%.x").map(
    lambda p: f"/{p}"
)
BODIES = st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["parameters", "ready", "key", "byte_size", "raw_handle", "b64", "file:x", "inputs"]), inner
        )
    ),
    max_leaves=6,
).map(lambda document: json.dumps(document).encode())
HEADERS = st.dictionaries(
    st.sampled_from(["content-type", "inference-header-content-length"]), st.text(max_size=6) | st.just("image/png")
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["GET", "POST", "PUT"]), PATHS, st.text(max_size=20), HEADERS, BODIES)
async def test_no_request_is_a_500(method: str, path: str, query: str, headers: dict[str, str], body: bytes) -> None:
    recorder = Recorder(ModelMetadata=_metadata(-1, 2))
    reply = await routed(HttpRequest(method, path, query, headers, body), recorder)
    assert reply.status in (200, 400, 404, 405, 503)
    assert reply.status in (200, 503) or set(shown(reply)) == {"error"}


async def test_only_a_load_may_carry_a_large_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_tensors, "JSON_BYTES", 10)
    recorder = Recorder()
    assert (await send(recorder, "POST", "/v2/logging", b" " * 11)).status == 400
    assert (await send(recorder, "POST", "/v2/repository/models/m/load", b" " * 11 + b"{}")).status == 200
