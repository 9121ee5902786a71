"""The public client, in its own environment, against a real server with real models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.clients.conftest import Script
from tests.server import onnx_models


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[onnx_models.LiveServer]:
    repository = tmp_path_factory.mktemp("clients") / "models"
    onnx_models.write_linear(repository)
    onnx_models.write_linear(repository, "single", max_batch=0)
    onnx_models.write_colors(repository)
    onnx_models.write_slow(repository)
    with onnx_models.serve(repository) as server:
        yield server


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("image") / "blue.jpg"
    Image.new("RGB", (30, 20), "blue").save(file, quality=95)
    return file


@pytest.fixture(scope="module")
def said(client_script: Script, live: onnx_models.LiveServer, image: Path) -> Any:
    """All that the client heard, in one conversation."""
    return json.loads(client_script("talk.py", live.url, str(image)))


def test_server_and_model_facts(said: Any) -> None:
    facts = said["facts"]
    assert (facts["live"], facts["ready"], facts["models"]) == (True, True, [True, False])
    assert facts["server"]["name"] == "convoy"
    assert {"classification", "statistics", "model_configuration"} <= set(facts["server"]["extensions"])
    assert facts["metadata"] == {
        "name": "linear",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": ["-1", "4"]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": ["-1", "3"]}],
    }
    config = facts["config"]
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("colors", "onnxruntime", 8)
    assert config["output"][0]["label_filename"] == "labels.txt"
    assert config["parameters"]["activation"] == {"string_value": "softmax"}


def test_answers(said: Any) -> None:
    answers = said["answers"]
    assert answers["batched"] == [[2.5, 4, 11], [0, 0, 3]]
    assert answers["unbatched"] == [2.5, 4, 11]
    assert answers["with_options"] == answers["gzip"] == [[2.5, 4, 11]]
    assert (answers["id"], answers["version"]) == ("r7", "1")


def test_classification(said: Any) -> None:
    answers = said["answers"]
    assert answers["classes"] == [
        ["11.000000:2:two", "4.000000:1:one"],
        ["3.000000:2:two", "0.000000:0:zero"],  # a tie: the lower index
    ]
    assert [[text.split(":", 1)[1] for text in row] for row in answers["images"]] == [["2:blue", "0:red"]] * 2


def test_images(said: Any) -> None:
    ((red, green, blue),) = said["answers"]["raw_image"]
    assert blue == pytest.approx(254 / 25.5, abs=0.1)  # what JPEG makes of pure blue
    assert max(red, green) < 0.1
    assert said["answers"]["pixels"] == [[0, 0, 0]]


ERRORS = {
    "model": ("NOT_FOUND", "Request for unknown model: 'nothing' is not found"),
    "version": ("NOT_FOUND", "Request for unknown model: 'linear' version 9 is not found"),
    "version_text": ("INVALID_ARGUMENT", "failed to get model version from specified version string"),
    "metadata": ("NOT_FOUND", "Request for unknown model: 'nothing' is not found"),
    "config": ("NOT_FOUND", "Request for unknown model: 'nothing' is not found"),
    # Triton says INVALID_ARGUMENT here alone; an unknown model is the same mistake everywhere.
    "statistics": ("NOT_FOUND", "requested model 'nothing' is not available"),
    "name": ("INVALID_ARGUMENT", "[request id: <id_unknown>] unexpected inference input 'zz' for model 'linear'"),
    "missing": ("INVALID_ARGUMENT", "expected 1 inputs but got 0 inputs for model 'linear'. Got input(s) []"),
    "datatype": ("INVALID_ARGUMENT", "inference input 'input' data-type is 'FP64', but model 'linear' expects 'FP32'"),
    "shape": (
        "INVALID_ARGUMENT",
        "unexpected shape for input 'input' for model 'linear'. Expected [-1,4], got [1,5]",
    ),
    "rank": (
        "INVALID_ARGUMENT",
        "unexpected shape for input 'input' for model 'linear'. Expected [-1,4], got [1,4,1]",
    ),
    "batch": ("INVALID_ARGUMENT", "inference request batch-size must be <= 8 for 'linear'"),
    "size": ("INVALID_ARGUMENT", "input byte size mismatch for input 'input' for model 'linear'. Expected 32, got 16"),
    "output": ("INVALID_ARGUMENT", "unexpected inference output 'zz' for model 'linear'"),
    "id": ("INVALID_ARGUMENT", "[request id: r9] unexpected shape for input 'input'"),
    "image": ("INVALID_ARGUMENT", "not a readable image"),
    "deadline": ("DEADLINE_EXCEEDED", ""),
    "timeout": ("DEADLINE_EXCEEDED", "Request timeout expired"),
    "unload": ("UNAVAILABLE", "explicit model load / unload is not allowed"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(said: Any, case: str) -> None:
    status, message = ERRORS[case]
    assert said["errors"][case]["status"] == f"StatusCode.{status}"
    assert message in said["errors"][case]["message"]


def test_64_clients_get_their_own_answers_and_are_all_counted(said: Any) -> None:
    assert said["wrong"] == []
    before, after = (said[when]["model_stats"][0] for when in ("before", "after"))
    requests = int(after["inference_stats"]["success"]["count"]) - int(before["inference_stats"]["success"]["count"])
    rows = int(after["inference_count"]) - int(before["inference_count"])
    assert requests == 64 * 8
    assert rows == 8 * sum(1 + number % 3 for number in range(64))
    assert int(after["execution_count"]) - int(before["execution_count"]) < requests  # they shared batches
    for part in ("queue", "compute_input", "compute_infer", "compute_output"):
        assert after["inference_stats"][part]["count"] == after["inference_stats"]["success"]["count"]
