"""The public HTTP client, in its own environment, against a real server with real models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from tests.clients.conftest import Script
from tests.server import onnx_models


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[onnx_models.LiveServer]:
    repository = tmp_path_factory.mktemp("http_clients") / "models"
    onnx_models.write_linear(repository)
    onnx_models.write_linear(repository, "single", max_batch=0)
    onnx_models.write_colors(repository)
    onnx_models.write_slow(repository)
    flags = ("--allow-client-shm", "--model-control-mode", "explicit", "--load-model", "*")
    with onnx_models.serve(repository, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def said(client_script: Script, live: onnx_models.LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All that the client heard, in one conversation."""
    image = tmp_path_factory.mktemp("image") / "blue.jpg"
    Image.new("RGB", (30, 20), "blue").save(image, quality=95)
    return json.loads(client_script("talk_http.py", live.http_url, str(image)))


def test_server_and_model_facts(said: Any) -> None:
    facts = said["facts"]
    assert (facts["live"], facts["ready"], facts["models"], facts["version"]) == (True, True, [True, False], True)
    assert facts["server"]["name"] == "convoy"
    assert facts["metadata"] == {
        "name": "linear",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}],
    }
    config = facts["config"]
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("colors", "onnxruntime", 8)
    assert config["input"][0]["dims"] == [8, 8, 3]
    assert config["parameters"]["activation"] == {"string_value": "softmax"}


@pytest.mark.parametrize("way", ["batched", "json_in", "json_out", "json_both", "gzip", "deflate"])
def test_answers_are_the_same_whichever_way_they_travel(said: Any, way: str) -> None:
    assert said["answers"][way] == [[2.5, 4, 11], [0, 0, 3]]


def test_ids_versions_and_options(said: Any) -> None:
    answers = said["answers"]
    assert (answers["id"], answers["version"], answers["unbatched"]) == ("r7", "1", [2.5, 4, 11])
    assert answers["with_options"] == [[2.5, 4, 11]]
    assert answers["async"] == [[[2.5 * n, 4 * n, 11 * n], [0, 0, 3 * n]] for n in range(4)]
    assert said["aio"] == [[number, 0, -number] for number in range(40)]


def test_classification(said: Any) -> None:
    answers = said["answers"]
    expected = [["11.000000:2:two", "4.000000:1:one"], ["3.000000:2:two", "0.000000:0:zero"]]
    assert answers["classes"] == answers["classes_json"] == expected
    assert [[text.split(":", 1)[1] for text in row] for row in answers["images"]] == [["2:blue", "0:red"]] * 2


ERRORS = {
    "model": ("404", "Request for unknown model: 'nothing' is not found"),
    "version": ("404", "Request for unknown model: 'linear' version 9 is not found"),
    "version_text": ("400", "failed to get model version from specified version string"),
    "metadata": ("404", "Request for unknown model: 'nothing' is not found"),
    "config": ("404", "Request for unknown model: 'nothing' is not found"),
    "statistics": ("404", "requested model 'nothing' is not available"),
    "name": ("400", "[request id: <id_unknown>] unexpected inference input 'zz' for model 'linear'"),
    "missing": ("400", "expected 1 inputs but got 0 inputs for model 'linear'. Got input(s) []"),
    "datatype": ("400", "inference input 'input' data-type is 'FP64', but model 'linear' expects 'FP32'"),
    "shape": ("400", "unexpected shape for input 'input' for model 'linear'. Expected [-1,4], got [1,5]"),
    "batch": ("400", "inference request batch-size must be <= 8 for 'linear'"),
    "size": ("400", "input byte size mismatch for input 'input' for model 'linear'. Expected 32, got 16"),
    "output": ("400", "unexpected inference output 'zz' for model 'linear'"),
    "id": ("400", "[request id: r9] unexpected shape for input 'input'"),
    "image": ("400", "not a readable image"),
    "timeout": ("504", "Request timeout expired"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(said: Any, case: str) -> None:
    status, message = ERRORS[case]
    assert said["errors"][case]["status"] == status
    assert message in said["errors"][case]["message"]


REFUSED = {
    "system_register": ({"400", "404", "500"}, "shared memory"),
    # Where there is no GPU, CUDA memory cannot be had either.
    "cuda_register": ({"400", "500", "501"}, "CUDA"),
    "cuda_status": ({"200", "501"}, ""),
    "cuda_unregister": ({"200", "501"}, ""),
}
"""Calls that name memory that there is not."""


@pytest.mark.parametrize(
    "call",
    [
        *("index", "unload", "load", "trace", "trace_update", "trace_model", "log", "log_update", "system_status"),
        *("system_register", "system_unregister", "cuda_status", "cuda_register", "cuda_unregister"),
    ],
)
def test_management_calls_reach_their_rpc(said: Any, call: str) -> None:
    heard = said["management"][call]
    statuses, text = REFUSED.get(call, ({"200"}, ""))
    assert heard["status"] in statuses, heard
    assert text.lower() in heard["message"].lower()


def test_what_management_calls_say(said: Any) -> None:
    heard = {call: outcome["value"] for call, outcome in said["management"].items()}
    assert {"name": "linear", "version": "1", "state": "READY", "reason": ""} in heard["index"]
    assert heard["trace_update"]["trace_rate"] == "7"
    assert isinstance(heard["trace"]["trace_level"], list)
    assert isinstance(heard["log"]["log_info"], bool)
    assert heard["system_status"] == []


def test_statistics(said: Any) -> None:
    one, every = said["statistics"]
    (linear,) = one["model_stats"]
    assert (linear["name"], linear["version"]) == ("linear", "1")
    assert linear["inference_stats"]["success"]["count"] >= 50
    assert {model["name"] for model in every["model_stats"]} == {"linear", "single", "colors", "slow"}
