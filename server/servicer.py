"""The gRPC methods: decode, ask the core, encode."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, TypeVar

import grpc
from grpc import aio

from protos.inference import grpc_service_pb2 as pb
from protos.inference import grpc_service_pb2_grpc
from server import codec
from server.core import Core
from server.errors import InvalidRequest, ServerError, UnknownModel
from server.metrics import Metrics
from server.servable import Servable
from server.status import CODES

log = logging.getLogger(__name__)

EXTENSIONS = ("classification", "schedule_policy", "model_configuration", "parameters", "statistics")
_Answer = TypeVar("_Answer")


def _answers(
    method: Callable[[Any, Any], Awaitable[_Answer]],
) -> Callable[[Any, Any, Any], Awaitable[_Answer]]:
    """Makes a gRPC handler of a method that knows no gRPC: its errors become statuses."""

    @wraps(method)
    async def handler(self: Servicer, request: Any, context: aio.ServicerContext[Any, Any]) -> _Answer:
        try:
            return await method(self, request)
        except Exception as error:
            await context.abort(*_status(error))
            raise AssertionError("abort() raises") from error

    return handler


def _status(error: Exception) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, ServerError):
        return CODES[type(error)], str(error)
    log.error("a bug in the server", exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"


class Servicer(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """The Open Inference Protocol over one Core. RPCs that are not here answer UNIMPLEMENTED."""

    def __init__(self, core: Core, metrics: Metrics, version: str) -> None:
        self._core = core
        self._metrics = metrics
        self._version = version

    @_answers
    async def ServerLive(self, request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """Whether the process answers at all."""
        return pb.ServerLiveResponse(live=True)

    @_answers
    async def ServerReady(self, request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """Whether inference requests are welcome."""
        return pb.ServerReadyResponse(ready=self._core.ready)

    @_answers
    async def ModelReady(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """Whether a model takes requests; False for one that is not known."""
        try:
            return pb.ModelReadyResponse(ready=self._model(request).state == "ready")
        except ServerError:
            return pb.ModelReadyResponse(ready=False)

    @_answers
    async def ServerMetadata(self, request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Name, version and protocol extensions."""
        return pb.ServerMetadataResponse(name="convoy", version=self._version, extensions=EXTENSIONS)

    @_answers
    async def ModelMetadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Inputs and outputs of a model."""
        model = self._model(request)
        return codec.metadata_to_proto(model.spec, self._core.versions(model.spec.name))

    @_answers
    async def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """The model's config.pbtxt, completed."""
        spec = self._model(request).spec
        return pb.ModelConfigResponse(config=self._core.config(spec.name, spec.version))

    @_answers
    async def ModelStatistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """The totals of one version, of all versions of a model, or of everything."""
        chosen = [
            m for m in self._core if request.name in ("", m.spec.name) and request.version in ("", m.spec.version)
        ]
        if request.name and not chosen:
            raise UnknownModel(request.name, request.version)
        return pb.ModelStatisticsResponse(model_stats=[codec.statistics_to_proto(m) for m in chosen])

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.ModelInferResponse:
        """One inference request; every one is counted with its outcome, whatever that is."""
        started, code = time.perf_counter(), grpc.StatusCode.CANCELLED
        # Names that no model has share one series, so that clients cannot make new ones.
        labels = ("", "")
        try:
            model = self._model_of(request.model_name, request.model_version)
            labels = (model.spec.name, model.spec.version)
            decoded = codec.request_from_proto(request, context.time_remaining())
            response = codec.proto_from_result(await model.infer(decoded), decoded, model.spec)
            code = grpc.StatusCode.OK
            return response
        except asyncio.CancelledError:
            raise
        except Exception as error:
            code, message = _status(error)
            await context.abort(code, _with_id(error, message, request.id))
            raise AssertionError("abort() raises") from error
        finally:
            self._metrics.requests.labels(*labels, "grpc", code.name).inc()
            if code is grpc.StatusCode.OK:
                self._metrics.request_duration.labels(*labels).observe(time.perf_counter() - started)

    def _model(self, request: pb.ModelReadyRequest | pb.ModelMetadataRequest | pb.ModelConfigRequest) -> Servable:
        return self._model_of(request.name, request.version)

    def _model_of(self, name: str, version: str) -> Servable:
        if version and not version.isdecimal():
            raise InvalidRequest(
                f"failed to get model version from specified version string '{version}': it must be a number"
            )
        return self._core.model(name, version)


async def _unimplemented(_: Servicer, request: Any, context: aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not implement this method")


# The generated base class would raise, and log a traceback, for each call of an RPC that is not here.
for _rpc in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
    if _rpc.name not in vars(Servicer):
        setattr(Servicer, _rpc.name, _unimplemented)


def _with_id(error: Exception, message: str, request_id: str) -> str:
    """Triton's prefix, which tells which request of many was wrong."""
    return f"[request id: {request_id or '<id_unknown>'}] {message}" if isinstance(error, InvalidRequest) else message
