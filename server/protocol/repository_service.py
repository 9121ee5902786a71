"""The RPCs that list, load and unload the models of the repository."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidRequest, Unimplemented, printable
from convoynet.server.repository.layout import is_name, is_version
from convoynet.server.types import Call

_FILE = "file:"
_MAX_CONFIG = 2**20


class Repository(Protocol):
    """What a core that loads and unloads models on request can do."""

    def index(self, ready_only: bool = False) -> Awaitable[Sequence[tuple[str, str, str, str]]]:
        """Name, version, state and reason of each version."""
        ...

    def load(
        self, name: str, config_override: Mapping[str, Any] | None = None, files: Mapping[str, bytes] | None = None
    ) -> Awaitable[object]:
        """Loads a model, or brings it up to date; `files` are by `<version>/<name>`."""
        ...

    def unload(self, name: str, unload_dependents: bool = False) -> Awaitable[object]:
        """Unloads every version of a model."""
        ...


class RepositoryService:
    """RepositoryIndex, RepositoryModelLoad and RepositoryModelUnload."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, call: Call) -> pb.RepositoryIndexResponse:
        """Every version of every model and where it stands."""
        _check_repository(request.repository_name)
        response = pb.RepositoryIndexResponse()
        for name, version, state, reason in await self._repository.index(request.ready):
            response.models.add(name=name, version=version, state=state, reason=reason)
        return response

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, call: Call
    ) -> pb.RepositoryModelLoadResponse:
        """Loads a model, with a config and files of the client's where it sends them."""
        _check_repository(request.repository_name)
        config: dict[str, Any] | None = None
        files: dict[str, bytes] = {}
        for name, parameter in request.parameters.items():
            kind = parameter.WhichOneof("parameter_choice")
            if name == "config":
                if kind != "string_param":
                    raise InvalidRequest("invalid value type for load parameter 'config', expected string_param.")
                config = _config(parameter.string_param)
            elif name.startswith(_FILE):
                if kind != "bytes_param":
                    raise InvalidRequest(f"invalid value type for load parameter '{name}', expected bytes_param.")
                path = name.removeprefix(_FILE)
                version, slash, file = path.partition("/")
                if not (slash and is_version(version) and is_name(file)):
                    raise InvalidRequest(f"load parameter '{printable(name[:160])}' must be file:<version>/<file name>")
                files[path] = parameter.bytes_param
            else:
                raise InvalidRequest(f"unrecognized load parameter '{name}'.")
        if files and config is None:
            raise InvalidRequest("files can be loaded only together with the load parameter 'config'")
        await self._repository.load(request.model_name, config, files or None)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, call: Call
    ) -> pb.RepositoryModelUnloadResponse:
        """Unloads a model once what it admitted is answered."""
        _check_repository(request.repository_name)
        dependents = False
        for name, parameter in request.parameters.items():
            if name != "unload_dependents":
                raise InvalidRequest(f"unrecognized unload parameter '{name}'.")
            if parameter.WhichOneof("parameter_choice") != "bool_param":
                raise InvalidRequest("invalid value type for 'unload_dependents' parameter, expected bool_param.")
            dependents = parameter.bool_param
        await self._repository.unload(request.model_name, dependents)
        return pb.RepositoryModelUnloadResponse()


def _check_repository(name: str) -> None:
    if name:
        raise Unimplemented("'repository_name' specification is not supported")


def _config(text: str) -> dict[str, Any]:
    if len(text) > _MAX_CONFIG:
        raise InvalidRequest(f"load parameter 'config' has {len(text)} characters, {_MAX_CONFIG} are allowed")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"load parameter 'config' is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"load parameter 'config' must be a JSON object, got {type(value).__name__}")
    return value
