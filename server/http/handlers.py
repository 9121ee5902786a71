"""What each HTTP endpoint does: a message from the path, the query and the body; an answer from the RPC's message."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from google.protobuf.message import Message

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidRequest, Oversize
from convoynet.server.http import json_tensors
from convoynet.server.http.json_tensors import Document

_SMALL = 256 * 2**10
"""JSON that is parsed on the event loop; more takes a thread."""
_JSON_BECOMES = 16
"""Bytes that a byte of JSON may become: a digit and its comma are an object, in three lists."""
HEADER_LENGTH = "inference-header-content-length"


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request: `path` as it came, still percent-encoded; names of headers in lower case; the body decompressed.

    `hold` counts bytes that the body becomes; it raises where the server holds too many.
    """

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | bytearray = b""
    hold: Callable[[int], None] = lambda size: None


@dataclass(frozen=True, slots=True)
class HttpReply:
    """One answer; the parts of the body follow each other, `code` is the gRPC status that says the same."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: tuple[bytes, ...] = ()
    code: str = "OK"


Names = Mapping[str, str]
Ask = Callable[[str, Message], Awaitable[Any]]


_CODES = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "CANCELLED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    505: "UNIMPLEMENTED",
}
"""What the refusals of HTTP alone are counted as, as gRPC would say it; all others are INVALID_ARGUMENT."""


def problem(status: int, message: str, headers: tuple[tuple[str, str], ...] = (), code: str = "") -> HttpReply:
    """An error as the protocol has it: one JSON object with one member."""
    body = json_tensors.dumps({"error": message})
    headers = (("content-type", "application/json"), *headers)
    return HttpReply(status, headers, (body,), code or _CODES.get(status, "INVALID_ARGUMENT"))


def json_reply(document: object, status: int = 200) -> HttpReply:
    """JSON with its content type."""
    return HttpReply(status, (("content-type", "application/json"),), (json_tensors.dumps(document),))


async def _infer(request: HttpRequest, names: Names, ask: Ask) -> HttpReply:
    """ModelInfer from JSON with or without binary tensors, from one image, or from one tensor's bytes."""
    message = pb.ModelInferRequest(model_name=names["model"], model_version=names["version"])
    json_bytes = _json_bytes(request.headers.get(HEADER_LENGTH))
    if request.headers.get("content-type", "").startswith("image/"):
        wanted = await _fill_from_image(request, message, ask)
    elif json_bytes == 0:
        wanted = await _fill_from_raw(request, message, ask)
    else:
        wanted = await _fill_from_json(request, json_bytes, message)
    response = await ask("ModelInfer", message)
    document, tail = json_tensors.body_from_response(response, wanted)
    if not tail:
        return HttpReply(200, (("content-type", "application/json"),), (document,))
    headers = (("content-type", "application/octet-stream"), (HEADER_LENGTH, str(len(document))))
    return HttpReply(200, headers, (document, *tail))


def _json_bytes(header: str | None) -> int | None:
    if header is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", header):
        raise InvalidRequest(f"Inference-Header-Content-Length must be a number of bytes, got '{header[:40]}'")
    return int(header)


async def _fill_from_json(
    request: HttpRequest, json_bytes: int | None, message: pb.ModelInferRequest
) -> json_tensors.Wanted:
    """The body is JSON, with or without binary tensors behind it."""
    size = len(request.body) if json_bytes is None else json_bytes
    if size <= _SMALL:
        return json_tensors.request_from_body(memoryview(request.body), json_bytes, message)
    if size <= json_tensors.JSON_BYTES:  # else it is refused
        request.hold(_JSON_BECOMES * size)
    return await asyncio.to_thread(json_tensors.request_from_body, memoryview(request.body), json_bytes, message)


async def _fill_from_image(request: HttpRequest, message: pb.ModelInferRequest, ask: Ask) -> json_tensors.Wanted:
    """The body is one encoded image: Convoy's own convenience. `?classification=K` asks for the top K classes."""
    metadata = await ask(
        "ModelMetadata", pb.ModelMetadataRequest(name=message.model_name, version=message.model_version)
    )
    name = metadata.inputs[0].name if metadata.inputs else ""
    message.inputs.add(name=name, datatype="BYTES", shape=[1])
    message.raw_input_contents.append(len(request.body).to_bytes(4, "little") + request.body)
    return _outputs_from_query(request, message, metadata)


async def _fill_from_raw(request: HttpRequest, message: pb.ModelInferRequest, ask: Ask) -> json_tensors.Wanted:
    """The body is the one input's bytes, without any JSON: Triton's raw binary request, of one row."""
    metadata = await ask(
        "ModelMetadata", pb.ModelMetadataRequest(name=message.model_name, version=message.model_version)
    )
    if len(metadata.inputs) != 1:
        raise InvalidRequest(
            f"a raw binary request needs a model with 1 input, '{message.model_name}' has {len(metadata.inputs)}"
        )
    only = metadata.inputs[0]
    shape = [1 if place == 0 and size < 0 else size for place, size in enumerate(only.shape)]
    if min(shape, default=0) < 0:
        raise InvalidRequest(
            f"input '{only.name}' has dimensions of any size, which a raw binary request cannot tell; send JSON with "
            "its shape before the data"
        )
    message.inputs.add(name=only.name, datatype=only.datatype, shape=shape)
    message.raw_input_contents.append(bytes(request.body))
    return _outputs_from_query(request, message, metadata)


def _outputs_from_query(
    request: HttpRequest, message: pb.ModelInferRequest, metadata: pb.ModelMetadataResponse
) -> json_tensors.Wanted:
    try:
        classes = parse_qs(request.query, max_num_fields=16).get("classification", [])
    except ValueError:
        raise InvalidRequest("the query has too many fields") from None
    if classes:
        if not re.fullmatch(r"[0-9]{1,9}", classes[0]):
            raise InvalidRequest(f"'classification' in the query must be a number, got '{classes[0][:40]}'")
        output = message.outputs.add(name=metadata.outputs[0].name)
        output.parameters["classification"].int64_param = int(classes[0])
    return json_tensors.Wanted()


Handler = Callable[[HttpRequest, Names, Ask], Awaitable[HttpReply]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What one path does for one method: which RPC, and how."""

    rpc: str
    handle: Handler


infer = Endpoint("ModelInfer", _infer)


def rpc(
    rpc: str, build: Callable[[Names, Document], Message], show: Callable[[Any], HttpReply] | None = None
) -> Endpoint:
    """The endpoint of an RPC: `build` its message, ask, `show` the answer, by default as JSON of the message."""

    async def handle(request: HttpRequest, names: Names, ask: Ask) -> HttpReply:
        if len(request.body) > json_tensors.JSON_BYTES and rpc != "RepositoryModelLoad":
            raise Oversize(f"the request JSON has {len(request.body)} bytes, {json_tensors.JSON_BYTES} are allowed")
        message = build(names, json_tensors.parse(request.body) if request.method == "POST" else {})
        response = await ask(rpc, message)
        return show(response) if show else json_reply(json_tensors.document_from_message(response))

    return Endpoint(rpc, handle)


def state(member: str) -> Callable[[Any], HttpReply]:
    """200 where the server or the model is up, else 503."""

    def show(response: Any) -> HttpReply:
        up = getattr(response, member)
        return json_reply({member: up}, 200 if up else 503)

    return show


def ok(response: Message) -> HttpReply:
    """200 without a body."""
    return HttpReply(200)


def load(names: Names, document: Document) -> pb.RepositoryModelLoadRequest:
    """`file:` parameters are files in base64, the others are as they are."""
    message = pb.RepositoryModelLoadRequest(repository_name=names["repository"], model_name=names["model"])
    parameters = json_tensors.members(document, "parameters")
    for name in [n for n in parameters if n.startswith("file:")]:
        message.parameters[name].bytes_param = _base64(parameters.pop(name), name)
    json_tensors.set_parameters(message.parameters, parameters)
    return message


def unload(names: Names, document: Document) -> pb.RepositoryModelUnloadRequest:
    """Parameters as they are."""
    message = pb.RepositoryModelUnloadRequest(repository_name=names["repository"], model_name=names["model"])
    json_tensors.set_parameters(message.parameters, json_tensors.members(document, "parameters"))
    return message


def index(names: Names, document: Document) -> pb.RepositoryIndexRequest:
    """`ready` alone."""
    ready = document.get("ready")
    if ready is not None and not isinstance(ready, bool):
        raise InvalidRequest("'ready' must be true or false")
    return pb.RepositoryIndexRequest(repository_name=names["repository"], ready=bool(ready))


def register_system(names: Names, document: Document) -> pb.SystemSharedMemoryRegisterRequest:
    """Key, offset and size of a region."""
    return pb.SystemSharedMemoryRegisterRequest(
        name=names["region"],
        key=json_tensors.text(document, "key"),
        offset=json_tensors.whole(document, "offset", 0),
        byte_size=json_tensors.whole(document, "byte_size"),
    )


def register_cuda(names: Names, document: Document) -> pb.CudaSharedMemoryRegisterRequest:
    """Handle in base64, device and size of a region."""
    return pb.CudaSharedMemoryRegisterRequest(
        name=names["region"],
        raw_handle=_base64(json_tensors.members(document, "raw_handle").get("b64"), "raw_handle"),
        device_id=json_tensors.whole(document, "device_id", 0),
        byte_size=json_tensors.whole(document, "byte_size"),
    )


def regions(response: Any) -> HttpReply:
    """A list, where the message has a map."""
    return json_reply([json_tensors.document_from_message(region) for region in response.regions.values()])


def trace(names: Names, document: Document) -> pb.TraceSettingRequest:
    """Null clears a setting: a value without texts."""
    message = pb.TraceSettingRequest(model_name=names.get("model", ""))
    for name, value in document.items():
        texts = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(one, str | int) and not isinstance(one, bool) for one in texts):
            raise InvalidRequest(f"trace setting '{name}' must be a text, a list of texts or null")
        message.settings[name].value.extend(map(str, texts))
    return message


def traced(response: pb.TraceSettingResponse) -> HttpReply:
    """The levels as a list, all else as one text."""
    values = {name: list(setting.value) for name, setting in response.settings.items()}
    return json_reply({n: v if n == "trace_level" or len(v) != 1 else v[0] for n, v in values.items()})


def log(names: Names, document: Document) -> pb.LogSettingsRequest:
    """Each setting by its JSON type."""
    message = pb.LogSettingsRequest()
    for name, value in document.items():
        if isinstance(value, bool):
            message.settings[name].bool_param = value
        elif isinstance(value, str):
            message.settings[name].string_param = value
        elif isinstance(value, int) and 0 <= value < 2**32:
            message.settings[name].uint32_param = value
        else:
            raise InvalidRequest(f"log setting '{name}' must be a boolean, a text or an integer of 0 to 2^32-1")
    return message


def logged(response: pb.LogSettingsResponse) -> HttpReply:
    """Each setting's value."""
    return json_reply(
        {n: getattr(s, s.WhichOneof("parameter_choice") or "", None) for n, s in response.settings.items()}
    )


def _base64(value: object, name: str) -> bytes:
    try:
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise InvalidRequest(f"'{name}' must be a text in base64")


def of_model(message: Callable[..., Message]) -> Callable[[Names, Document], Message]:
    """A message of a model's name and version alone."""
    return lambda names, _: message(name=names["model"], version=names["version"])


def of_region(message: Callable[..., Message]) -> Callable[[Names, Document], Message]:
    """A message of a region's name alone."""
    return lambda names, _: message(name=names["region"])
