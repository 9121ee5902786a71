"""What each RPC of the protocol does, whatever the front end: messages in, messages out, errors as ServerError."""

from __future__ import annotations

from dataclasses import dataclass

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidRequest, NoStatistics, ServerError
from convoynet.server.memory.shared_memory import Regions
from convoynet.server.models.core import Core
from convoynet.server.models.servable import Servable
from convoynet.server.protocol import answers, codec
from convoynet.server.protocol.forms import Forms, Found
from convoynet.server.types import Call


@dataclass(frozen=True)
class ServiceOptions:
    """How the protocol is spoken.

    Attributes:
        version: The server's.
        extensions: Of the protocol, that it has.
        regions: The memory that clients share with it; None where they may not.
    """

    version: str
    extensions: tuple[str, ...] = ()
    regions: Regions | None = None


class Service:
    """Health, facts, statistics and inference over one Core: a coroutine for each RPC, under its name.

    Attributes:
        forms: Of the requests that were answered.
    """

    def __init__(self, core: Core, options: ServiceOptions) -> None:
        self._core = core
        self._options = options
        self.forms = Forms()

    async def ServerLive(self, request: pb.ServerLiveRequest, call: Call) -> pb.ServerLiveResponse:
        """Whether the process answers at all."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, call: Call) -> pb.ServerReadyResponse:
        """Whether inference requests are welcome."""
        return pb.ServerReadyResponse(ready=self._core.ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, call: Call) -> pb.ModelReadyResponse:
        """Whether a model takes requests; False for one that is not known."""
        try:
            return pb.ModelReadyResponse(ready=self._model(request.name, request.version).state == "ready")
        except InvalidRequest:
            raise
        except ServerError:
            return pb.ModelReadyResponse(ready=False)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, call: Call) -> pb.ServerMetadataResponse:
        """Name, version and protocol extensions."""
        return pb.ServerMetadataResponse(
            name="convoy", version=self._options.version, extensions=self._options.extensions
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, call: Call) -> pb.ModelMetadataResponse:
        """Inputs and outputs of a model."""
        model = self._model(request.name, request.version)
        return answers.metadata_to_proto(model.spec, self._core.versions(model.spec.name))

    async def ModelConfig(self, request: pb.ModelConfigRequest, call: Call) -> pb.ModelConfigResponse:
        """The model's config.pbtxt, completed, with what was found out when it was loaded."""
        model = self._model(request.name, request.version)
        response = pb.ModelConfigResponse(config=self._core.config(model.spec.name, model.spec.version))
        if not model.spec.placements:  # the number of engines was measured
            for group in response.config.instance_group:
                group.count = model.spec.instances
        for name, value in model.info.items():
            response.config.parameters[name].string_value = value
        return response

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, call: Call) -> pb.ModelStatisticsResponse:
        """The totals of one version, of all versions of a model, or of everything."""
        _check_version(request.version)
        named = [m for m in self._core if request.name in ("", m.spec.name)]
        chosen = [m for m in named if request.version in ("", m.spec.version)]
        if request.name and not chosen:
            raise NoStatistics(request.name, request.version if named else "")
        return pb.ModelStatisticsResponse(model_stats=[answers.statistics_to_proto(m) for m in chosen])

    async def ModelInfer(self, request: pb.ModelInferRequest, call: Call) -> pb.ModelInferResponse:
        """One inference request; it is counted when it is over (Ledger)."""
        model = call.served = self._model(request.model_name, request.model_version)
        decoded = codec.request_from_proto(request, call, model.spec, self._options.regions)
        result = call.result = await model.infer(decoded)
        response = answers.proto_from_result(result, decoded, model.spec, call.raw_outputs)
        if call.form:
            self.forms.learn(call.form, decoded, result, model.spec)
        return response

    async def infer_alike(self, found: Found, call: Call) -> bytes | None:
        """ModelInfer of what `forms` has found: the answer, serialized; None where it has to be parsed after all."""
        form = found.form
        model = self._core.model(form.model, form.version)
        if model.spec is not form.spec:
            self.forms.forget(form)
            return None
        call.served = model
        result = call.result = await model.infer(form.request(found, call))
        return form.answer(result, found.id)

    def _model(self, name: str, version: str) -> Servable:
        _check_version(version)
        return self._core.model(name, version)


def _check_version(version: str) -> None:
    if version and not (version.isascii() and version.isdecimal()):
        raise InvalidRequest(
            f"failed to get model version from specified version string '{version}', version should be an integral "
            "value > 0"
        )
