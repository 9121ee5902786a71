"""The repository RPCs over a core that writes down what it is asked: what a core does is tested with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.protocol.dispatch import Dispatcher
from convoynet.server.protocol.repository_service import RepositoryService
from convoynet.server.types import Call


class Notebook:
    """Remembers every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    async def index(self, ready_only: bool = False) -> list[tuple[str, str, str, str]]:
        lines = [("a", "1", "READY", ""), ("b", "2", "UNAVAILABLE", "no file")]
        return lines[: 1 if ready_only else 2]

    async def load(
        self, name: str, config_override: Mapping[str, Any] | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        self.calls.append(("load", name, config_override, files))

    async def unload(self, name: str, unload_dependents: bool = False) -> None:
        self.calls.append(("unload", name, unload_dependents))


def _load(**parameters: str | bytes | int) -> pb.RepositoryModelLoadRequest:
    request = pb.RepositoryModelLoadRequest(model_name="m")
    for name, value in parameters.items():
        kind = {str: "string_param", bytes: "bytes_param", int: "int64_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


async def _ask(book: Notebook, rpc: str, request: Any) -> tuple[grpc.StatusCode, str, bytes]:
    reply = await Dispatcher([RepositoryService(book)]).unary(rpc, request.SerializeToString(), Call("grpc"))
    return reply.code, reply.message, reply.payload


async def test_index() -> None:
    for ready, names in ((False, ["a", "b"]), (True, ["a"])):
        request = pb.RepositoryIndexRequest(ready=ready)
        _, _, payload = await _ask(Notebook(), "RepositoryIndex", request)
        models = pb.RepositoryIndexResponse.FromString(payload).models
        assert [m.name for m in models] == names
    (_, last) = pb.RepositoryIndexResponse.FromString(
        (await _ask(Notebook(), "RepositoryIndex", pb.RepositoryIndexRequest()))[2]
    ).models
    assert (last.version, last.state, last.reason) == ("2", "UNAVAILABLE", "no file")


async def test_load_and_unload() -> None:
    book = Notebook()
    await _ask(book, "RepositoryModelLoad", _load())
    files = {"file:1/model.onnx": b"\0onnx", "file:12/labels.txt": b"a"}
    await _ask(book, "RepositoryModelLoad", _load(config='{"backend": "onnxruntime"}', **files))
    unload = pb.RepositoryModelUnloadRequest(model_name="m")
    await _ask(book, "RepositoryModelUnload", unload)
    unload.parameters["unload_dependents"].bool_param = True
    await _ask(book, "RepositoryModelUnload", unload)
    assert book.calls == [
        ("load", "m", None, None),
        ("load", "m", {"backend": "onnxruntime"}, {"1/model.onnx": b"\0onnx", "12/labels.txt": b"a"}),
        ("unload", "m", False),
        ("unload", "m", True),
    ]


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"config": 1}, "invalid value type for load parameter 'config', expected string_param."),
        ({"config": "{"}, "load parameter 'config' is not JSON"),
        ({"config": "[" * 100_000}, "load parameter 'config' is not JSON"),
        ({"config": "[]"}, "load parameter 'config' must be a JSON object, got list"),
        (
            {"file:1/model.onnx": "x"},
            "invalid value type for load parameter 'file:1/model.onnx', expected bytes_param.",
        ),
        ({"file:1/model.onnx": b"x"}, "only together with the load parameter 'config'"),
        ({"nothing": 1}, "unrecognized load parameter 'nothing'."),
        *(
            ({"config": "{}", f"file:{path}": b"x"}, "must be file:<version>/<file name>")
            for path in ("1/../../x", "/etc/passwd", "1/.x", "x/model.onnx", "0/model.onnx", "1/a/b", "1/", "1/a\0")
        ),
    ],
)
async def test_wrong_loads_do_not_reach_the_core(parameters: dict[str, Any], text: str) -> None:
    book = Notebook()
    code, message, _ = await _ask(book, "RepositoryModelLoad", _load(**parameters))
    assert (code, book.calls) == (grpc.StatusCode.INVALID_ARGUMENT, [])
    assert text in message


@pytest.mark.parametrize("name", ["unload_dependents", "nothing"])
async def test_wrong_unloads_do_not_reach_the_core(name: str) -> None:
    book = Notebook()
    request = pb.RepositoryModelUnloadRequest(model_name="m")
    request.parameters[name].int64_param = 1
    code, message, _ = await _ask(book, "RepositoryModelUnload", request)
    assert (code, book.calls) == (grpc.StatusCode.INVALID_ARGUMENT, [])
    assert name in message


async def test_a_repository_cannot_be_named() -> None:
    for rpc, kind in {"Index": "Index", "ModelLoad": "ModelLoad", "ModelUnload": "ModelUnload"}.items():
        request = getattr(pb, f"Repository{kind}Request")(repository_name="r")
        code, message, _ = await _ask(Notebook(), f"Repository{rpc}", request)
        assert (code, message) == (
            grpc.StatusCode.UNIMPLEMENTED,
            "'repository_name' specification is not supported",
        )
