"""What was checked is what is served: every file that a model is made of, and the names of its classes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from convoynet.server import engines
from convoynet.server.engines.base import EngineSpec
from convoynet.server.errors import InvalidModel
from convoynet.server.repository import repository
from convoynet.server.repository.labels import LabelFiles
from convoynet.server.repository.specs import Defaults
from tests.server.conftest import fake_model
from tests.server.engine_setup import spec_of
from tests.server.onnx_graphs import FLOAT, node, write_graph

CONFIG = (
    'max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: [3] } '
    'output { name: "y" data_type: TYPE_FP32 dims: [3] }'
)


def with_weights(root: Path, location: str = "weights.bin") -> Path:
    """The version's folder of a model whose weights lie in a file of their own."""
    values = [("x", FLOAT, ["B", 3])], [("y", FLOAT, ["B", 3])]
    constants = {"w": np.float32([2, 2, 2])}
    return write_graph(root, [node("Mul", "x w", "y")], *values, constants, config=CONFIG, external=location) / "1"


def report(version: Path, *names: str) -> None:
    """Writes a report that names these files as they are now."""
    formats = [{"file": f"1/{n}", "sha256": hashlib.sha256((version / n).read_bytes()).hexdigest()} for n in names]
    (version.parent / "report.json").write_text(json.dumps({"formats": formats}))


def reason(root: Path, **defaults: bool) -> str:
    (found,) = repository.scan(root, Defaults(4, 1, **defaults))
    return found.reason


def test_weights_beside_the_graph_are_compared_with_the_report(tmp_path: Path) -> None:
    version = with_weights(tmp_path)
    report(version, "model.onnx", "weights.bin")
    assert reason(tmp_path, require_report=True) == ""
    (version / "weights.bin").write_bytes(np.float32([9, 9, 9]).tobytes())
    assert "the sha256 of 1/weights.bin is" in reason(tmp_path)
    report(version, "model.onnx")
    assert reason(tmp_path) == ""
    assert "no report.json that names 1/weights.bin" in reason(tmp_path, require_report=True)


@pytest.mark.parametrize("where", ["../../../secret.bin", "/etc/hostname"])
def test_weights_outside_of_the_folder_are_not_read(tmp_path: Path, where: str) -> None:
    version = with_weights(tmp_path / "models", "x" * len(where))
    graph = version / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"x" * len(where), where.encode()))
    (tmp_path / "secret.bin").write_bytes(bytes(12))
    assert "leads out of the model's folder" in reason(tmp_path / "models")


@pytest.mark.parametrize("later", ['{"fail_above": 0.5}', "[]"], ids=["longer", "as long"])
def test_a_file_that_takes_the_place_of_the_checked_one_is_not_run(tmp_path: Path, later: str) -> None:
    fake_model(tmp_path)
    spec = EngineSpec.of(spec_of(tmp_path, "fake"))
    engines.load(spec).engine.close()
    file = tmp_path / "sum" / "1" / "model.json"
    file.with_name("new").write_text(later)
    file.with_name("new").replace(file)
    with pytest.raises(InvalidModel, match=r"model\.json was changed after it had been checked: load the model again"):
        engines.load(spec)


def test_labels_are_read_once(tmp_path: Path) -> None:
    labels = LabelFiles(tmp_path)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    assert labels.lines("labels.txt", "labels.txt") == ["cat", "dog"]
    (tmp_path / "labels.txt").write_text("dog\ncat\nfrog\n")
    assert labels.lines("labels.txt", "labels.txt") == ["cat", "dog"]
