"""`convoy build`: from a file to a file, and the plan of a published model again."""

import hashlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from onnx import helper

from convoynet.exporter.commands import build_command
from convoynet.exporter.publishing import model_folder
from convoynet.exporter.tensorrt.library import require
from convoynet.protos.inference import model_config_pb2 as pb
from tests.exporter.engines import model_of, needs_tensorrt, pair

ROOT = Path(__file__).parents[3]
INT8 = pair(np.array(0, np.int8))
CPU = pair(np.array(0, np.uint8))
DEFERRED = {
    "target": "gpu",
    "precision": "int8",
    "tensorrt_build": "deferred",
    "tensorrt_profiles": "1:2:8,1:1:1",
    "tensorrt_workspace_mib": "1024",
    "tensorrt_sparse_weights": "true",
}
REPORT = {
    "schema_version": 1,
    "formats": [
        {"format": "tensorrt", "file": "2/model.plan", "sha256": "old", "bytes": 1},
        {"format": "onnx", "file": "2/model.onnx"},
    ],
    "engine": {"library": "tensorrt", "version": "10.12", "line": "old"},
    "parity": {"samples": 8},
}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    file = tmp_path / "model.onnx"
    file.write_bytes(INT8)
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with two versions, of which the newest has an old plan, labels beside it and reports."""
    folder = tmp_path / "models" / "net"
    for version in ("1", "2"):
        (folder / version).mkdir(parents=True)
        (folder / version / "model.onnx").write_bytes(INT8)
        (folder / version / "model.plan").write_bytes(b"old plan")
    (folder / "2" / "other.bin").write_bytes(b"kept")
    (folder / "labels.txt").write_text("a\nb\n")
    for place in (folder, folder / "2"):
        (place / "report.json").write_text(json.dumps(REPORT))
        (place / "report.md").write_text("# net\n\n| size | 1 |\n| engine | old |\n| accuracy | 1 |\n")
    write_config(folder, DEFERRED)
    return folder


def write_config(model: Path, parameters: dict[str, str], **fields: Any) -> None:
    stated = {"backend": "tensorrt", "platform": "tensorrt_plan", "max_batch_size": 8, **fields}
    config = pb.ModelConfig(name=model.name, default_model_filename="model.onnx", **stated)
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    (model / "config.pbtxt").write_text(text_format.MessageToString(config))


def config_of(model: Path) -> pb.ModelConfig:
    return text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert build_command.build(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    *_, line = err.splitlines()
    assert line.startswith("convoy build: ")
    return line


@needs_tensorrt
def test_a_file_from_a_file(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"old plan")
    argv = [str(graph), "--output", str(plan), "--batch", "1:2:8", "--batch", "1", "--json", "--progress", "json"]
    assert build_command.build(argv) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    library = require()
    assert (told["library"], told["version"]) == (library.name, library.version)
    assert told["profiles"] == ["1:2:8", "1:1:1"]
    assert told["bytes"] == plan.stat().st_size > 10_000
    assert told["seconds"] > 0
    assert told["layers"] == {}  # a pair computes nothing
    assert told["file"] == str(plan)
    if library.compiles_at_load:
        assert (told["compute_capability"], told["inspected"]) == ("any", False)
        assert [layer["type"] for layer in told["details"]].count("QUANTIZE") == 1
    lines = [json.loads(line) for line in err.splitlines()]
    assert {frozenset(line) for line in lines} == {frozenset({"phase", "fraction"})}
    fractions = [line["fraction"] for line in lines if line["phase"].startswith("build an engine")]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.plan"]


@needs_tensorrt
def test_the_result_for_people(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(graph), "--output", str(tmp_path / "model.plan"), "--batch", "1:4", "--layers", "--progress", "none"]
    graph.write_bytes(model_of([helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Exp", ["h"], ["y"])], {}))
    assert build_command.build([*argv, "--hardware-compatible"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"built     {tmp_path / 'model.plan'}, " in out
    assert "batches   1:4:4\n" in out
    if require().compiles_at_load:
        assert "compiles on the GPU that loads it" in out
        assert "note      TensorRT-RTX needs no --hardware-compatible" in out
        assert "layers    2 in fp32 (of the graph, which TensorRT fuses further)\n" in out
        assert re.search(r"^node_of_h +activation +fp32 -> fp32$", out, re.M)


@needs_tensorrt
def test_a_graph_for_the_cpu_is_refused_with_the_linters_line(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph.write_bytes(CPU)
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"old plan")
    line = refused([str(graph), "--output", str(plan), "--batch", "1:8"], capsys, 2)
    assert "QuantizeLinear 'pair.q' uses UINT8" in line
    assert "--target gpu" in line
    assert plan.read_bytes() == b"old plan"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["{graph}"], "say --output model.plan"),
        (["{folder}/none.onnx"], "no model's folder in a repository"),
        (["{folder}/none.onnx", "--output", "{folder}/x", "--batch", "1"], "no such file"),
        (["{graph}", "--output", "{folder}/x"], "an engine needs the batches"),
        (["{graph}", "--output", "{folder}/none/x", "--batch", "1"], "there is no folder"),
        (["{graph}", "--output", "{folder}/x", "--batch", "8:2:1"], "rising from 1, like 1:8:64"),
        (["{graph}", "--output", "{folder}/x", "--batch", "some"], "not smallest:usual:largest"),
        (["{graph}", "--output", "{folder}/x", "--batch", "1", "--workspace-mib", "0"], "give 1 MiB or more"),
        (["{graph}", "--output", "{folder}/x", "--batch", "1", "--refit", "--strip"], "not allowed with"),
        (["{folder}"], "it has no version"),
    ],
)
def test_what_cannot_be_used(
    argv: list[str], line: str, graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [text.format(graph=graph, folder=tmp_path) for text in argv]
    assert line in refused([*given, "--progress", "none"], capsys, 2)
    assert files_of(tmp_path) == {"model.onnx": INT8}


@needs_tensorrt
def test_the_plan_of_a_model_is_built_again_in_place(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(model)
    assert build_command.build([str(model), "--json", "--progress", "none", "--optimization-level", "0"]) == 0
    told = json.loads(capsys.readouterr().out)
    after = files_of(model)
    plan = after["2/model.plan"]
    assert told["file"] == str(model / "2" / "model.plan")
    assert told["bytes"] == len(plan) > 10_000
    assert told["profiles"] == ["1:2:8", "1:1:1"]
    changed = {name for name in before if before[name] != after[name]}
    both = {"report.json", "report.md"}
    assert changed == {"config.pbtxt", "2/model.plan", *both, *(f"2/{name}" for name in both)}
    assert before.keys() == after.keys()
    assert [path.name for path in model.parent.iterdir()] == ["net"]

    config = config_of(model)
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    library = require()
    assert config.default_model_filename == "model.plan"
    assert (config.backend, config.max_batch_size) == ("tensorrt", 8)
    assert parameters == {
        "target": "gpu",
        "precision": "int8",
        "tensorrt_library": library.name,
        "tensorrt_version": library.version,
        "compute_capability": told["compute_capability"],
        "driver_version": told["driver_version"],
        "version_compatible": "false",
        "hardware_compatible": "false",
        "tensorrt_profiles": "1:2:8,1:1:1",
        "tensorrt_optimization_level": "0",
        "tensorrt_workspace_mib": "1024",
        "tensorrt_sparse_weights": "true",
    }
    report = json.loads(after["report.json"])
    assert report["parity"] == REPORT["parity"]
    first, second = report["formats"]
    assert second == {"format": "onnx", "file": "2/model.onnx"}
    assert (first["file"], first["bytes"]) == ("2/model.plan", len(plan))
    assert first["sha256"] == hashlib.sha256(plan).hexdigest()
    assert report["engine"]["version"] == library.version
    assert report["engine"]["deferred"] is False
    assert f"| engine | {library.title} built it: " in after["report.md"].decode()
    assert b"| accuracy | 1 |" in after["2/report.md"]


@needs_tensorrt
def test_what_was_built_is_built_again_the_same_way(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_command.build([str(model), "--batch", "1:8", "--progress", "none"]) == 0
    first = config_of(model)
    assert first.parameters["tensorrt_profiles"].string_value == "1:8:8"
    assert build_command.build([str(model), "--progress", "none"]) == 0
    assert config_of(model) == first
    capsys.readouterr()


@needs_tensorrt
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda model: write_config(model, DEFERRED, max_batch_size=16), "promises batches up to 16 .*--batch 1:8:16"),
        (lambda model: write_config(model, {}), "no parameter tensorrt_profiles"),
        (lambda model: write_config(model, DEFERRED, backend="onnxruntime", platform=""), "served by onnxruntime, not"),
        (lambda model: (model / "config.pbtxt").unlink(), "has no config.pbtxt"),
        (lambda model: (model / "config.pbtxt").write_text("name: 1"), "cannot be read"),
        (lambda model: (model / "2" / "model.onnx").unlink(), "a plan is built from it: export the model again"),
        (lambda model: (model / "2" / "model.onnx").write_bytes(CPU), "uses UINT8.*--target gpu"),
        (lambda model: (model / "2" / "report.json").write_text("{"), "no JSON"),
    ],
)
def test_a_model_that_cannot_be_built_stays_as_it_is(
    model: Path, change: Any, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(model)
    before = files_of(model.parent)
    said = refused([str(model), "--progress", "none"], capsys, 2)
    assert re.search(line, said), said
    assert files_of(model.parent) == before


def test_a_stripped_plan_is_not_for_a_server(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no weights to serve" in refused([str(model), "--strip", "--progress", "none"], capsys, 2)


@needs_tensorrt
def test_a_failure_at_the_last_step_changes_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Any, source: Path, target: Path, plan: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder.Told, "update", full)
    before = files_of(model.parent)
    assert "No space left on device" in refused([str(model), "--progress", "none"], capsys, 2)
    assert files_of(model.parent) == before


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_command.build(["--help"]) == 0
    out = capsys.readouterr().out
    for word in ("convoy build models/resnet101", "--batch 1:8:64", "--timing-cache", "Exit codes", "docs/tensorrt.md"):
        assert word in out


_SLIM = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"onnx", "torch", "torchvision", "onnxruntime", "matplotlib"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
from convoynet.exporter.commands.build_command import build
sys.exit(build(sys.argv[1:]))
"""


@needs_tensorrt
def test_a_serving_image_needs_neither_torch_nor_onnx(model: Path) -> None:
    """What was exported for a GPU was linted then."""
    command = [sys.executable, "-c", _SLIM, str(model), "--progress", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (model / "2" / "model.plan").stat().st_size > 10_000


@needs_tensorrt
def test_ctrl_c_ends_the_build(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    nodes = [helper.make_node("Relu", [f"t{at}"], [f"t{at + 1}"]) for at in range(1500)]
    nodes[0].input[0], nodes[-1].output[0] = "x", "y"
    file.write_bytes(model_of(nodes, {}))
    code = "import sys; from convoynet.exporter.commands.build_command import build; sys.exit(build(sys.argv[1:]))"
    argv = [str(file), "--output", str(tmp_path / "model.plan"), "--batch", "1:8", "--progress", "json"]
    command = [sys.executable, "-c", code, *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if json.loads(line)["phase"].startswith("build an engine"):
                process.send_signal(signal.SIGINT)
                break
        last = process.stderr.read().splitlines()[-1]
    assert process.returncode == 130
    assert last == "convoy build: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
