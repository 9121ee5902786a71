"""Trace and log settings: what they change, what is refused, and the RPCs over them."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidRequest, Unimplemented
from convoynet.server.observing.log_settings import LogSettings
from convoynet.server.observing.trace_settings import TraceOptions, TraceSettings
from tests.server.conftest import Serving, code_of, fake_model


def test_settings_of_a_model_stand_before_the_servers() -> None:
    settings = TraceSettings()
    settings.update({"trace_rate": ["7"], "trace_level": ["TIMESTAMPS"]})
    settings.update({"trace_rate": ["3"]}, "m")
    assert settings.options() == TraceOptions("TIMESTAMPS", 7)
    assert settings.options("m") == TraceOptions("TIMESTAMPS", 3)
    settings.update({"trace_rate": []}, "m")
    settings.update({"trace_rate": ["9"]})
    assert settings.options("m") == TraceOptions("TIMESTAMPS", 9)
    settings.update({"trace_rate": [], "trace_level": []})
    assert settings.options("m") == TraceOptions()


def test_what_the_server_was_started_with_is_what_a_cleared_setting_is() -> None:
    settings = TraceSettings(TraceOptions("TIMESTAMPS", 10))
    settings.update({"trace_level": ["OFF"], "trace_rate": ["1"]})
    settings.update({"trace_level": [], "trace_rate": []})
    assert settings.options() == TraceOptions("TIMESTAMPS", 10)


def test_one_request_in_so_many_is_traced_until_the_count_is_used_up() -> None:
    settings = TraceSettings(TraceOptions("TIMESTAMPS", 3, 2))
    assert [settings.wants("m") for _ in range(12)] == [*[False, False, True] * 2, *[False] * 6]
    assert settings.options().trace_count == 0
    settings.update({"trace_count": ["1"]}, "m")
    settings.update({"trace_rate": ["1"]})
    assert [settings.wants("m"), settings.wants("m"), settings.wants("other")] == [True, False, False]


@pytest.mark.parametrize(("options", "chosen"), [(TraceOptions(), False), (TraceOptions("TIMESTAMPS", 1, 0), False)])
def test_nothing_is_traced_that_is_off(options: TraceOptions, chosen: bool) -> None:
    assert TraceSettings(options).wants("m", sampled=True) is chosen


def test_a_client_that_decided_is_followed() -> None:
    settings = TraceSettings(TraceOptions("TIMESTAMPS", 0))
    decisions = (None, True, False)
    assert [settings.wants("m", sampled) for sampled in decisions] == [False, True, False]


@pytest.mark.parametrize(
    "values",
    [
        {"trace_rate": ["x"]}, {"trace_rate": ["-1"]}, {"trace_rate": [str(2**32)]}, {"trace_rate": ["1", "2"]},
        {"trace_rate": ["9" * 5000]}, {"trace_rate": [""]}, {"trace_rate": ["\u0663"]}, {"trace_count": ["-2"]},
        {"trace_level": ["TENSORS"]}, {"trace_level": ["OFF", "TIMESTAMPS"]}, {"nothing": ["1"]},
    ],
)  # fmt: skip
def test_wrong_trace_settings_change_nothing(values: dict[str, list[str]]) -> None:
    settings = TraceSettings()
    with pytest.raises(InvalidRequest):
        settings.update({"log_frequency": ["5"], **values})
    assert settings.options() == TraceOptions()


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    own = logging.getLogger("convoy-test")
    own.propagate = False
    own.setLevel(logging.INFO)
    own.addHandler(logging.StreamHandler(io.StringIO()))
    yield own
    own.handlers.clear()


def _written(logger: logging.Logger) -> list[str]:
    """What one record of each level, from a logger below, adds to the log."""
    handler = next(h for h in logger.handlers if type(h) is logging.StreamHandler)
    begin = len(handler.stream.getvalue())
    for level in ("debug", "info", "warning", "error"):
        getattr(logger.getChild("part"), level)(level)
    return str(handler.stream.getvalue()[begin:]).splitlines()


def test_levels_take_effect_on_the_log(logger: logging.Logger) -> None:
    settings = LogSettings(logger)
    assert _written(logger) == ["info", "warning", "error"]
    settings.update({"log_info": False, "log_warning": False})
    assert _written(logger) == ["error"]
    settings.update({"log_error": False, "log_verbose_level": 1})
    assert _written(logger) == ["debug"]
    settings.close()
    assert _written(logger) == ["info", "warning", "error"]


def test_the_format_takes_effect_on_the_log(logger: logging.Logger) -> None:
    settings = LogSettings(logger)
    settings.update({"log_format": "ISO8601"})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO info", _written(logger)[0])
    settings.update({"log_format": "default"})
    assert _written(logger)[0] == "info"


def test_no_file_can_be_named_from_afar(logger: logging.Logger) -> None:
    with pytest.raises(Unimplemented, match="log file location can not be updated"):
        LogSettings(logger).update({"log_file": "/tmp/x"})
    with pytest.raises(Unimplemented, match="trace file location can not be updated"):
        TraceSettings().update({"trace_file": ["/tmp/x"]})


async def test_settings_over_grpc(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    before = logging.getLogger().level
    async with serving() as running:
        stub = running.stub
        request = pb.TraceSettingRequest(model_name="sum")
        request.settings["trace_rate"].value.append("5")
        settings = (await stub.TraceSetting(request)).settings
        assert {name: list(value.value) for name, value in settings.items()} == {
            "trace_level": ["OFF"], "trace_rate": ["5"], "trace_count": ["-1"], "log_frequency": ["0"],
            "trace_mode": ["opentelemetry"], "trace_file": [""],
        }  # fmt: skip
        assert running.app.traces.options("sum").trace_rate == 5
        assert running.app.traces.options().trace_rate == 1000
        unknown = pb.TraceSettingRequest(model_name="zz")
        assert (await code_of(stub.TraceSetting(unknown)))[0] is grpc.StatusCode.NOT_FOUND
        log = pb.LogSettingsRequest()
        log.settings["log_verbose_level"].uint32_param = 1
        answer = (await stub.LogSettings(log)).settings
        assert answer["log_verbose_level"].uint32_param == 1
        assert logging.getLogger().level == logging.DEBUG
        log.settings["log_info"].SetInParent()
        code, text = await code_of(stub.LogSettings(log))
        assert (code, json.dumps("log_info") in text.replace("'", '"')) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert logging.getLogger().level == before
