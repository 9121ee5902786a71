"""The public client drives every extension of the protocol."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.conftest import Script
from tests.server import onnx_models


@pytest.fixture(scope="module")
def said(client_script: Script, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All that the client heard, in one conversation."""
    repository = tmp_path_factory.mktemp("extensions") / "models"
    onnx_models.write_linear(repository)
    onnx_models.write_linear(repository, "single", max_batch=0)
    control = ("--no-tune", "--model-control-mode", "explicit", "--load-model", "*")
    with onnx_models.serve(repository, "--allow-client-shm", *control) as server:
        return json.loads(client_script("talk_extensions.py", server.url))


def test_a_stream_answers_in_order_and_goes_on_after_an_error(said: Any) -> None:
    first, wrong, last = said["stream"]
    assert first == [[[0, 0, 0]], True]
    assert "[request id: 1] unexpected shape for input 'input'" in wrong[0]
    assert last == [[[3, 4, 4]], True]


def test_tensors_travel_through_shared_memory(said: Any) -> None:
    heard = said["shared_memory"]
    assert (heard["status"], heard["in_message"]) == (["logits", "rows"], False)
    assert heard["logits"] == [[2.5, 4, 11], [0, 0, 3]]
    assert heard["again"] == ["StatusCode.ALREADY_EXISTS", "shared memory region 'rows' already in manager"]
    gone, infer, status = heard["gone"]
    assert (gone, status) == (["OK", ""], {})
    assert infer == ["StatusCode.NOT_FOUND", "Unable to find shared memory region: 'rows'"]


def test_cuda_regions_are_refused(said: Any) -> None:
    status, register, unregister = said["cuda"]
    assert (status, unregister) == ({}, ["OK", ""])
    assert register[0] in ("StatusCode.UNIMPLEMENTED", "StatusCode.INVALID_ARGUMENT")


def test_trace_settings(said: Any) -> None:
    updated, of_server, cleared = (answer["settings"] for answer in said["trace"])
    assert (updated["trace_rate"]["value"], updated["trace_level"]["value"]) == (["5"], ["TIMESTAMPS"])
    for settings in (of_server, cleared):
        assert (settings["trace_rate"]["value"], settings["trace_level"]["value"]) == (["1000"], ["OFF"])


def test_log_settings(said: Any) -> None:
    *changes, file = said["log"]
    seen = [(a["settings"]["log_verbose_level"], a["settings"]["log_format"]) for a in changes]
    off = ({"uint32_param": 0}, {"string_param": "default"})
    assert seen == [({"uint32_param": 1}, {"string_param": "ISO8601"}), off, off]
    assert file[0] == "StatusCode.UNIMPLEMENTED"


def test_models_are_listed_loaded_and_unloaded(said: Any) -> None:
    assert said["repository"] == [["OK", ""]] * 3


def test_statistics_have_every_part(said: Any) -> None:
    (totals,) = said["statistics"]["modelStats"]
    parts = {"success", "fail", "queue", "computeInput", "computeInfer", "computeOutput", "cacheHit", "cacheMiss"}
    assert set(totals["inferenceStats"]) == parts
    assert {"system_shared_memory", "statistics", "trace", "logging"} <= set(said["extensions"])
