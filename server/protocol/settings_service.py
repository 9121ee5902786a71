"""The RPCs that show and change what the server traces and logs."""

from __future__ import annotations

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidRequest
from convoynet.server.models.core import Core
from convoynet.server.observing.log_settings import LogSettings, Value
from convoynet.server.observing.trace_settings import TraceSettings
from convoynet.server.types import Call


class SettingsService:
    """TraceSetting and LogSettings: an empty request shows the settings, any other changes them first."""

    def __init__(self, core: Core, trace: TraceSettings, log: LogSettings) -> None:
        self._core = core
        self._trace = trace
        self._log = log

    async def TraceSetting(self, request: pb.TraceSettingRequest, call: Call) -> pb.TraceSettingResponse:
        """What is traced, of one model or of all that have no settings of their own."""
        if request.model_name:
            self._core.model(request.model_name)
        self._trace.update({name: list(value.value) for name, value in request.settings.items()}, request.model_name)
        response = pb.TraceSettingResponse()
        for name, text in self._trace.options(request.model_name).as_text().items():
            response.settings[name].value.append(text)
        return response

    async def LogSettings(self, request: pb.LogSettingsRequest, call: Call) -> pb.LogSettingsResponse:
        """What is logged."""
        given: dict[str, Value] = {}
        for name, setting in request.settings.items():
            kind = setting.WhichOneof("parameter_choice")
            if kind is None:
                raise InvalidRequest(f"log setting '{name}' has no value")
            given[name] = getattr(setting, kind)
        if given:
            self._log.update(given)
        response = pb.LogSettingsResponse()
        for name, value in self._log.values().items():
            field = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(response.settings[name], field, value)
        return response
