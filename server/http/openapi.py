"""/v2/openapi.json: what the HTTP port offers, as OpenAPI 3.1, from the very tables that answer its requests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import model_config_pb2
from convoynet.server.datatypes import DATATYPES
from convoynet.server.http.handlers import HEADER_LENGTH, Ask, Endpoint, HttpReply, HttpRequest, Names, json_reply
from convoynet.server.http.page import FILES
from convoynet.server.http.routes import Path, Routes, names, plain, table
from convoynet.server.security.security import NEEDS

Document = dict[str, Any]
PATH = "/v2/openapi.json"
_JSON = "application/json"
_BYTES = "application/octet-stream"
_OPEN: Document = {"type": "object"}
_TEXT: Document = {"type": "string"}
_NUMBER: Document = {"type": "integer", "minimum": 0}


def offered(*routes: Routes) -> Sequence[Path]:
    """The paths of these tables, and that of the document about all of them, made when it is first asked for."""

    async def handle(request: HttpRequest, names: Names, ask: Ask) -> HttpReply:
        return reply()

    @cache
    def reply() -> HttpReply:
        return json_reply(document(*routes, own))

    own = {PATH: {"GET": Endpoint("OpenApi", handle)}}
    return table(*routes, own)


def document(*routes: Routes) -> Document:
    """The description of these tables: an operation for each form of each path and each of its methods."""
    components = _Components()
    paths: Document = {}
    for each in routes:
        for template, methods in each.items():
            for path in plain(template):
                shown = paths[path] = {"parameters": [_parameter(name) for name in names(path)]}
                for method, endpoint in methods.items():
                    shown[method.lower()] = _operation(method, path, endpoint.rpc, components)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Convoy over HTTP",
            "version": "2",
            "summary": "The Open Inference Protocol's REST form, version 2, with Triton's extensions.",
            "description": "HEAD is answered wherever GET is. An operation's tag is the call of gRPC that it is, and "
            "every error is one JSON object with the member `error`.",
        },
        "paths": paths,
        "components": {
            "schemas": components.schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


class _Components:
    """Schemas by name: those that are written here, and those of messages as they are asked for."""

    def __init__(self) -> None:
        self.schemas: Document = dict(_SCHEMAS)

    def of(self, message: Any) -> Document:
        """A reference to the schema of a message (its descriptor) as json_tensors.document_from_message() shows it."""
        name = message.full_name.removeprefix("inference.")
        if name not in self.schemas:
            shown: Document = {"type": "object", "properties": {}, "required": []}
            self.schemas[name] = shown  # before its fields, which may have it again
            for each in message.fields:
                shown["properties"][each.name] = self._field(each)
                if not each.has_presence:
                    shown["required"].append(each.name)
        return _reference(name)

    def _field(self, each: FieldDescriptor) -> Document:
        of = each.message_type
        if of is not None and of.GetOptions().map_entry:
            return {"type": "object", "additionalProperties": self._value(of.fields_by_name["value"])}
        return {"type": "array", "items": self._value(each)} if each.is_repeated else self._value(each)

    def _value(self, each: FieldDescriptor) -> Document:
        if each.message_type is not None:
            return self.of(each.message_type)
        if each.enum_type is not None:
            return {"type": "string", "enum": [value.name for value in each.enum_type.values]}
        kinds = {
            FieldDescriptor.CPPTYPE_BOOL: "boolean",
            FieldDescriptor.CPPTYPE_FLOAT: "number",
            FieldDescriptor.CPPTYPE_DOUBLE: "number",
            FieldDescriptor.CPPTYPE_STRING: "string",
        }
        kind: Document = {"type": kinds.get(each.cpp_type, "integer")}
        return kind | {"contentEncoding": "base64"} if each.type == FieldDescriptor.TYPE_BYTES else kind


def _reference(name: str) -> Document:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(of: Document) -> Document:
    return {"type": "array", "items": of}


def _members(required: Sequence[str] = (), /, **members: Document) -> Document:
    return {"type": "object", "properties": members, **({"required": list(required)} if required else {})}


_SCHEMAS: Document = {
    "Error": _members(["error"], error=_TEXT),
    "Live": _members(["live"], live={"type": "boolean"}),
    "Ready": _members(["ready"], ready={"type": "boolean"}),
    "Parameters": {
        "type": "object",
        "maxProperties": 256,
        "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
    },
    "Tensor": _members(
        ["name", "datatype", "shape"],
        name=_TEXT,
        datatype={"type": "string", "enum": list(DATATYPES)},
        shape={"type": "array", "maxItems": 64, "items": {"type": "integer"}},
        parameters=_reference("Parameters"),
        data={
            "type": ["array", "null"],
            "description": "Nested or flat, row-major. Missing where `binary_data_size` or a shared memory region is.",
        },
    ),
    "RequestedOutput": _members(["name"], name=_TEXT, parameters=_reference("Parameters")),
    "InferRequest": _members(
        id={"type": ["string", "integer", "null"]},
        parameters=_reference("Parameters"),
        inputs=_list(_reference("Tensor")),
        outputs=_list(_reference("RequestedOutput")),
    ),
    "InferResponse": _members(
        ["model_name", "model_version", "outputs"],
        model_name=_TEXT,
        model_version=_TEXT,
        id=_TEXT,
        parameters=_reference("Parameters"),
        outputs=_list(_reference("Tensor")),
    ),
}


@dataclass(frozen=True)
class _Told:
    """What an operation does.

    Attributes:
        summary: In a line.
        answer: The JSON of its answer: a schema, or the message that it shows; None for an answer without a body.
        body: The JSON of a POST's request.
        takes: Further kinds of bodies.
        gives: Kinds of answers besides JSON, or in its place.
        parameters: Those beside the path's.
        or_503: Whether the same answer comes with status 503 as well.
    """

    summary: str
    answer: Document | type[Message] | None = None
    body: Document | None = None
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    parameters: tuple[Document, ...] = ()
    or_503: bool = False


_SETTINGS: Document = {"type": "object", "additionalProperties": {"type": ["string", "array", "integer", "boolean"]}}
_SYSTEM = pb.SystemSharedMemoryStatusResponse.RegionStatus
_CUDA = pb.CudaSharedMemoryStatusResponse.RegionStatus
_TOLD: Mapping[str, _Told] = {
    "ServerLive": _Told("Whether the process answers at all", _reference("Live"), or_503=True),
    "ServerReady": _Told("Whether inference requests are welcome", _reference("Ready"), or_503=True),
    "ModelReady": _Told("Whether a model takes requests", _reference("Ready"), or_503=True),
    "ServerMetadata": _Told("Name, version and extensions of the server", pb.ServerMetadataResponse),
    "ModelMetadata": _Told("Inputs and outputs of a model", pb.ModelMetadataResponse),
    "ModelConfig": _Told("A model's config, completed", model_config_pb2.ModelConfig),
    "ModelStatistics": _Told("Counts and times since models were loaded", pb.ModelStatisticsResponse),
    "ModelInfer": _Told(
        "Ask a model: JSON, JSON with binary tensors behind it, one encoded image, or the bytes of one tensor",
        _reference("InferResponse"),
        _reference("InferRequest"),
        takes=(_BYTES, "image/*"),
        gives=(_BYTES,),
        parameters=(
            {
                "name": "classification",
                "in": "query",
                "description": "With an image: how many of the best classes of the first output to give.",
                "schema": _NUMBER,
            },
            {
                "name": HEADER_LENGTH,
                "in": "header",
                "description": "Where the JSON of the body ends and its binary tensors begin; 0 for a tensor alone.",
                "schema": _NUMBER,
            },
        ),
    ),
    "RepositoryIndex": _Told(
        "The models that there are, and their states",
        pb.RepositoryIndexResponse.ModelIndex,
        _members(ready={"type": ["boolean", "null"]}),
    ),
    "RepositoryModelLoad": _Told("Load a model, or bring it up to date", None, _members(parameters=_OPEN)),
    "RepositoryModelUnload": _Told("Unload a model", None, _members(parameters=_reference("Parameters"))),
    "SystemSharedMemoryStatus": _Told("Regions of system memory that clients share", _SYSTEM),
    "SystemSharedMemoryRegister": _Told(
        "Share a region of system memory",
        None,
        _members(["key", "byte_size"], key=_TEXT, offset=_NUMBER, byte_size=_NUMBER),
    ),
    "SystemSharedMemoryUnregister": _Told("Share a region, or all of them, no longer", None, _OPEN),
    "CudaSharedMemoryStatus": _Told("Regions of GPU memory that clients share", _CUDA),
    "CudaSharedMemoryRegister": _Told(
        "Share a region of GPU memory",
        None,
        _members(
            ["raw_handle", "byte_size"],
            raw_handle=_members(["b64"], b64={"type": "string", "contentEncoding": "base64"}),
            device_id=_NUMBER,
            byte_size=_NUMBER,
        ),
    ),
    "CudaSharedMemoryUnregister": _Told("Share a region, or all of them, no longer", None, _OPEN),
    "TraceSetting": _Told("Which requests are traced; a POST that names settings changes them", _SETTINGS, _OPEN),
    "LogSettings": _Told("What is logged; a POST that names settings changes it", _SETTINGS, _OPEN),
    "Overview": _Told("What the page shows; it may change with any version of the server", _OPEN),
    "ModelReport": _Told("The report of a model's export", gives=("text/html",)),
    "Page": _Told("A file of the page about the server", gives=tuple(k.partition(";")[0] for k in FILES.values())),
    "OpenApi": _Told("This document", _OPEN),
}
_LISTED = ("RepositoryIndex", "SystemSharedMemoryStatus", "CudaSharedMemoryStatus")
"""Calls whose answer is a list of the message that they are told with."""


def _operation(method: str, path: str, rpc: str, components: _Components) -> Document:
    told, needs = _TOLD[rpc], NEEDS[rpc]
    schema = components.of(told.answer.DESCRIPTOR) if isinstance(told.answer, type) else told.answer
    if schema is not None and rpc in _LISTED:
        schema = _list(schema)
    content = {} if schema is None else {_JSON: {"schema": schema}}
    content |= {kind: {} for kind in told.gives}
    answer = {"description": "The answer", **({"content": content} if content else {})}
    shown: Document = {
        "operationId": method.lower() + "".join(part[:1].upper() + part[1:] for part in re.findall(r"\w+", path)),
        "summary": told.summary,
        "tags": [rpc],
        "responses": {
            "200": answer,
            **({"503": {**answer, "description": "It does not"}} if told.or_503 else {}),
            "default": {"description": "An error", "content": {_JSON: {"schema": _reference("Error")}}},
        },
        "security": [{}, {"bearer": []}, {"key": []}] if needs else [],
    }
    if needs:
        shown["description"] = f"Where the server has tokens: needs the role {' or '.join(sorted(needs))}."
    if told.parameters:
        shown["parameters"] = list(told.parameters)
    if method == "POST" and told.body is not None:
        kinds = {_JSON: {"schema": told.body}, **{kind: {} for kind in told.takes}}
        shown["requestBody"] = {"content": kinds}
    return shown


def _parameter(name: str) -> Document:
    schema = {"type": "string", "pattern": "^[1-9][0-9]{0,17}$"} if name == "version" else _TEXT
    return {"name": name, "in": "path", "required": True, "schema": schema}
