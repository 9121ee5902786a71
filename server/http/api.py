"""The HTTP side of the protocol without a transport: requests to RPCs of the dispatcher, errors to statuses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidRequest
from convoynet.server.http import handlers as handle
from convoynet.server.http import json_tensors
from convoynet.server.http.handlers import HttpReply, HttpRequest, Names, problem
from convoynet.server.http.parsing import Refused
from convoynet.server.http.routes import Path, Routes, table
from convoynet.server.protocol.dispatch import Reply
from convoynet.server.types import Call

STATUS: dict[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""Every gRPC status that the server ends a call with; a test holds this to server/status.py."""


class Answers(Protocol):
    """What answers an RPC: the dispatcher."""

    async def message(self, rpc: str, request: Message, call: Call) -> Message:
        """The answer to one RPC; raises ServerError."""
        ...

    def refused(self, rpc: str, call: Call) -> Reply | None:
        """The refusal of a call whose caller may not make it at all."""
        ...

    def refusal(self, error: Exception, request: Message | None = None) -> Reply:
        """What a client is told of an error."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: what answers it, and the names in its path."""

    endpoint: handle.Endpoint
    names: Names


def route(method: str, path: str, paths: Sequence[Path] | None = None) -> Route | HttpReply:
    """What of `paths`, of the protocol's without them, answers a path, still percent-encoded; HEAD is GET.

    Returns:
        An HttpReply where nothing does.
    """
    for each in PROTOCOL if paths is None else paths:
        if (found := each.pattern.fullmatch(path)) is not None:
            endpoint = each.methods.get("GET" if method == "HEAD" else method)
            if endpoint is None:
                allowed = ("HEAD", *each.methods) if "GET" in each.methods else tuple(each.methods)
                return problem(405, "Method Not Allowed", (("allow", ", ".join(sorted(allowed))),))
            try:
                return Route(endpoint, _decoded(found.groupdict(default="")))
            except InvalidRequest as error:
                return problem(400, str(error))
    return problem(404, "Not Found")


async def answer(request: HttpRequest, to: Route, call: Call, answers: Answers) -> HttpReply:
    """Answers one request; raises nothing but Refused and CancelledError."""
    asked: list[Message] = [pb.ServerLiveRequest()]

    async def ask(rpc: str, message: Message) -> Message:
        asked.append(message)
        return await answers.message(rpc, message, call)

    try:
        return await to.endpoint.handle(request, to.names, ask)
    except Refused:
        raise
    except Exception as error:
        return refused(answers.refusal(error, asked[-1]))


def refused(reply: Reply) -> HttpReply:
    """An error of the dispatcher's as HTTP says it."""
    headers: tuple[tuple[str, str], ...] = ()
    if reply.code is grpc.StatusCode.UNAUTHENTICATED:
        headers = (("www-authenticate", "Bearer"),)
    elif reply.trailers or reply.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        wait_ms = float(dict(reply.trailers).get("grpc-retry-pushback-ms", 0))
        headers = (("retry-after", str(max(1, math.ceil(wait_ms / 1000)))),)
    status = 503 if reply.full else STATUS[reply.code]
    return problem(status, reply.message, headers, reply.code.name)


def _decoded(names: Mapping[str, str]) -> Names:
    for value in names.values():
        if "%" in value and (broken := _BROKEN_ESCAPE.search(value)):
            raise InvalidRequest(f"the path holds '{broken[0]}', which is no percent-encoded byte")
    try:
        return {key: unquote(value, errors="strict") for key, value in names.items()}
    except UnicodeDecodeError:
        raise InvalidRequest("the path holds percent-encoded bytes that are not UTF-8") from None


_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2}).{0,2}")
_MODEL = "/v2/models/{model}[/versions/{version}]"
_REPOSITORY = "/v2/repository[/{repository}]"
_REGION = "sharedmemory[/region/{region}]"
_trace_handlers: dict[str, handle.Endpoint] = {
    "GET": handle.rpc("TraceSetting", handle.trace, handle.traced),
    "POST": handle.rpc("TraceSetting", handle.trace, handle.traced),
}
_log_handlers: dict[str, handle.Endpoint] = {
    "GET": handle.rpc("LogSettings", handle.log, handle.logged),
    "POST": handle.rpc("LogSettings", handle.log, handle.logged),
}
_statistics = handle.rpc("ModelStatistics", handle.of_model(pb.ModelStatisticsRequest))

ROUTES: Routes = {
    _MODEL + "/infer": {"POST": handle.infer},
    "/v2/health/live": {"GET": handle.rpc("ServerLive", lambda *_: pb.ServerLiveRequest(), handle.state("live"))},
    "/v2/health/ready": {"GET": handle.rpc("ServerReady", lambda *_: pb.ServerReadyRequest(), handle.state("ready"))},
    "/v2[/]": {"GET": handle.rpc("ServerMetadata", lambda *_: pb.ServerMetadataRequest())},
    "/v2/models/stats": {"GET": handle.rpc("ModelStatistics", lambda *_: pb.ModelStatisticsRequest())},
    _MODEL: {"GET": handle.rpc("ModelMetadata", handle.of_model(pb.ModelMetadataRequest))},
    _MODEL + "/ready": {"GET": handle.rpc("ModelReady", handle.of_model(pb.ModelReadyRequest), handle.state("ready"))},
    _MODEL + "/config": {
        "GET": handle.rpc(
            "ModelConfig",
            handle.of_model(pb.ModelConfigRequest),
            lambda response: handle.json_reply(json_tensors.document_from_message(response.config)),
        )
    },
    _MODEL + "/stats": {"GET": _statistics},
    "/v2/models/{model}/trace/setting": _trace_handlers,
    "/v2/trace/setting": _trace_handlers,
    "/v2/logging": _log_handlers,
    _REPOSITORY + "/index": {
        "POST": handle.rpc(
            "RepositoryIndex",
            handle.index,
            lambda response: handle.json_reply(json_tensors.document_from_message(response)["models"]),
        )
    },
    _REPOSITORY + "/models/{model}/load": {"POST": handle.rpc("RepositoryModelLoad", handle.load, handle.ok)},
    _REPOSITORY + "/models/{model}/unload": {"POST": handle.rpc("RepositoryModelUnload", handle.unload, handle.ok)},
    "/v2/system" + _REGION + "/status": {
        "GET": handle.rpc(
            "SystemSharedMemoryStatus", handle.of_region(pb.SystemSharedMemoryStatusRequest), handle.regions
        )
    },
    "/v2/system" + _REGION + "/unregister": {
        "POST": handle.rpc(
            "SystemSharedMemoryUnregister", handle.of_region(pb.SystemSharedMemoryUnregisterRequest), handle.ok
        )
    },
    "/v2/systemsharedmemory/region/{region}/register": {
        "POST": handle.rpc("SystemSharedMemoryRegister", handle.register_system, handle.ok)
    },
    "/v2/cuda" + _REGION + "/status": {
        "GET": handle.rpc("CudaSharedMemoryStatus", handle.of_region(pb.CudaSharedMemoryStatusRequest), handle.regions)
    },
    "/v2/cuda" + _REGION + "/unregister": {
        "POST": handle.rpc(
            "CudaSharedMemoryUnregister", handle.of_region(pb.CudaSharedMemoryUnregisterRequest), handle.ok
        )
    },
    "/v2/cudasharedmemory/region/{region}/register": {
        "POST": handle.rpc("CudaSharedMemoryRegister", handle.register_cuda, handle.ok)
    },
}
PROTOCOL = table(ROUTES)
