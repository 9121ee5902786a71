"""Engines that are really built, by TensorRT-RTX where there is no GPU: what is published, said, and refused."""

import hashlib
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from google.protobuf import text_format
from torch import nn

from convoynet.exporter import archs
from convoynet.exporter.commands import cli, inspect_command, lint_command
from convoynet.exporter.commands.compare_command import compare
from convoynet.exporter.commands.sweep_command import sweep
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.engine_options import BuildOptions, Profile
from convoynet.exporter.errors import BadInput, Missing, Refused
from convoynet.exporter.evidence.parity import Parity
from convoynet.exporter.evidence.spread import Spread
from convoynet.exporter.evidence.verify import check_engine
from convoynet.exporter.pipeline import engine, preflight
from convoynet.exporter.pipeline.pipeline import Published, run
from convoynet.exporter.progress import Interruptible, Progress, Quiet
from convoynet.exporter.publishing import model_config
from convoynet.exporter.publishing.model_folder import rebuild
from convoynet.exporter.recipe import Int8, Sparsify
from convoynet.exporter.tensorrt import library
from convoynet.exporter.tensorrt.build import BuiltEngine, build
from convoynet.protos.inference import model_config_pb2 as pb
from tests.exporter.engines import needs_tensorrt

T = TypeVar("T")
ROOT = Path(__file__).parents[3]
FOUND = library.find()
# What every config has, and what the server reads of an engine.
COMMON = {"preprocess", "task", "activation", "arch", "precision", "target"}
BUILT = {
    "tensorrt_library", "tensorrt_version", "tensorrt_profiles", "compute_capability", "driver_version",
    "version_compatible", "hardware_compatible",
}  # fmt: skip
TINY = ExportConfig("lenet5", target="gpu", format="tensorrt", batch=(1, 2), calibration_samples=16)


def parameters(folder: Path) -> tuple[pb.ModelConfig, dict[str, str]]:
    config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    return config, {key: value.string_value for key, value in config.parameters.items()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """LeNet-5 in INT8 as an engine with two profiles; tests only read it."""
    root = tmp_path_factory.mktemp("models")
    profiles = (Profile(1, 2, 4), Profile(5, 6, 6))
    return run(replace(TINY, repository=root, batch=None, profiles=profiles, steps=(Int8(),)), Quiet())


@needs_tensorrt
def test_engine_and_graph_are_published_with_their_hashes(digits: Published) -> None:
    told = json.loads((digits.folder.parent / "report.json").read_text())
    assert [(entry["format"], entry["file"]) for entry in told["formats"]] == [
        ("tensorrt", "1/model.plan"),
        ("onnx", "1/model.onnx"),
    ]
    for entry in told["formats"]:
        content = (digits.folder.parent / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)


@needs_tensorrt
def test_the_config_has_the_parameters_that_the_server_reads_and_no_others(digits: Published) -> None:
    assert FOUND is not None
    config, stated = parameters(digits.folder.parent)
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.default_model_filename == "model.plan"
    assert config.max_batch_size == 6
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert stated.keys() == COMMON | BUILT
    assert stated["tensorrt_library"] == FOUND.name
    assert stated["tensorrt_version"] == FOUND.version
    assert stated["tensorrt_profiles"] == "1:2:4,5:6:6"
    assert stated["precision"] == "int8"
    assert stated["version_compatible"] == stated["hardware_compatible"] == "false"
    if FOUND.compiles_at_load:
        assert stated["compute_capability"] == "any"
    if not torch.cuda.is_available():
        assert stated["driver_version"] == ""


@needs_tensorrt
def test_the_report_says_what_the_engine_is_and_where_it_runs(digits: Published) -> None:
    assert FOUND is not None
    told = json.loads(digits.report.to_json())["engine"]
    assert (told["library"], told["version"]) == (FOUND.name, FOUND.version)
    assert told["profiles"] == ["1:2:4", "5:6:6"]
    assert told["published"]
    assert not told["deferred"]
    assert told["precisions"]["int8"] >= 3  # two convolutions and a fully connected layer at least
    assert {layer["type"] for layer in told["layers"]} & {"CONVOLUTION"}
    assert told["line"].startswith(f"{FOUND.title} built it: ")
    if FOUND.compiles_at_load:
        assert "compiles on the GPU that loads it" in told["line"]
    for file in ("report.md", "report.html"):
        text = (digits.folder.parent / file).read_text()
        assert told["line"] in text
        assert "model.plan" in text
        assert f"{told['precisions']['int8']} int8" in text


@needs_tensorrt
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the engine itself is measured")
def test_without_a_gpu_the_graph_is_measured_as_tensorrt_reads_it_and_the_report_says_so(digits: Published) -> None:
    report = digits.report
    assert "as TensorRT reads it" in report.parity.runtime
    assert report.parity.top1_agreement is not None
    assert report.parity.top1_agreement > 0.98
    assert report.engine is not None
    assert not report.engine["ran"]
    assert any("built, not run" in caveat for caveat in report.caveats)


@pytest.mark.gpu
@needs_tensorrt
def test_on_a_gpu_the_engine_itself_is_measured(digits: Published) -> None:
    report = digits.report
    assert FOUND is not None
    assert FOUND.version in report.parity.runtime
    assert report.engine is not None
    assert report.engine["ran"]
    assert [stage["stage"] for stage in report.stages][-1] == "engine"
    assert report.parity.batch_sizes == (1, 2, 5, 6)


def test_a_deferred_build_leaves_the_graph_and_how_to_build_it(tmp_path: Path) -> None:
    config = replace(
        TINY,
        repository=tmp_path,
        defer_build=True,
        optimization_level=4,
        workspace_mib=512,
        version_compatible=True,
        hardware_compatible=True,
        steps=(Sparsify(),),
    )
    published = run(config, Quiet())
    described, stated = parameters(tmp_path / "lenet5")
    assert described.default_model_filename == "model.onnx"
    assert (described.backend, described.platform) == ("tensorrt", "tensorrt_plan")
    assert {key: stated[key] for key in stated.keys() - COMMON} == {
        "tensorrt_build": "deferred",
        "tensorrt_profiles": "1:2:2",
        "tensorrt_optimization_level": "4",
        "tensorrt_workspace_mib": "512",
        "tensorrt_version_compatible": "true",
        "tensorrt_hardware_compatible": "true",
        "tensorrt_sparse_weights": "true",
    }
    assert not list(published.folder.glob("*.plan"))
    assert [entry["format"] for entry in published.report.formats] == ["onnx"]
    assert published.report.engine is not None
    assert published.report.engine["deferred"]
    assert "left to the server" in published.report.engine["line"]
    assert any("the server's to build" in caveat for caveat in published.report.caveats)


@needs_tensorrt
def test_the_builder_gets_the_flags_and_sparsity_asks_for_the_sparse_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BuildOptions] = []

    def watched(model: Path, options: BuildOptions, progress: Progress) -> BuiltEngine:
        asked.append(options)
        return real(model, options, progress)

    real = build
    monkeypatch.setattr(engine, "build", watched)
    config = replace(
        TINY, repository=tmp_path, timing_cache=tmp_path / "timing", optimization_level=2, workspace_mib=64
    )
    assert not config.build_options("classification").sparse_weights
    run(replace(config, steps=(Sparsify(),)), Quiet())
    assert asked == [
        BuildOptions((Profile(1, 2, 2),), 2, 64 * 2**20, tmp_path / "timing", sparse_weights=True),
    ]
    # A rebuild is to be the same build.
    _, stated = parameters(tmp_path / "lenet5")
    assert {key: stated[key] for key in stated.keys() - COMMON - BUILT} == {
        "tensorrt_optimization_level": "2",
        "tensorrt_workspace_mib": "64",
        "tensorrt_sparse_weights": "true",
    }


@needs_tensorrt
def test_another_runtime_than_the_last_version_s_is_said(digits: Published) -> None:
    onnx = replace(TINY, format="onnx", batch=(1, 6))
    described = model_config.model_config(onnx, archs.get("lenet5"), [[10]])
    assert model_config.changes(digits.folder.parent, described) == [
        "runtime changes from tensorrt to onnxruntime against the earlier version"
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "cpu"], "drop --target cpu"),
        (["--batch", "2:4"], "--batch 2:4: no profile of the engine takes a batch of 1,"),
        (["--batch", "1:1", "--batch", "4:8:16"], "--batch 4:8:16: no profile of the engine takes a batch of 2 to 3,"),
        (["--batch", "1:9:8"], "1:9:8"),
        (["--batch", "1:8:5000"], "more than 4096 images"),
        (["--batch", "1:2:3:4"], "MIN:USUAL:MAX"),
        (["--optimization-level", "6"], "--optimization-level 6 is not in 0..5"),
        (["--workspace-mib", "0"], "--workspace-mib 0 is not 1 or more"),
        (["--defer-build", "--timing-cache", "t"], "drop one of them"),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_work(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "models"
    assert cli.export(["--arch", "lenet5", "--format", "tensorrt", "--model-repository", str(root), *flags]) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1
    assert not root.exists()


@pytest.mark.parametrize(
    "flags",
    [["--batch", "1:2:4"], ["--batch", "1:2", "--batch", "3:4"], ["--defer-build"], ["--hardware-compatible"]],
)
def test_flags_of_an_engine_need_one(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.export(["--arch", "lenet5", *flags]) == 2
    assert "add --format tensorrt" in capsys.readouterr().err


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which neither library can be imported."""
    caches = [found for found in vars(library).values() if hasattr(found, "cache_clear")]
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    for cached in caches:
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("no_tensorrt")
def test_without_tensorrt_the_ways_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "models"
    where = ["--arch", "lenet5", "--format", "tensorrt", "--batch", "1:2", "--model-repository", str(root)]
    assert cli.export(where) == 4
    printed = capsys.readouterr().err
    assert "pip install tensorrt" in printed
    assert "--defer-build" in printed
    assert not root.exists()
    task = preflight.check(replace(TINY, defer_build=True), Quiet())
    assert engine.make_engine(task, tmp_path / "model.onnx").line.startswith("left to the server")
    assert any("no TensorRT builder is installed here" in caveat for caveat in task.caveats)


class Suppressing(nn.Module):
    """A classifier that keeps as many positions as are bright."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images.flatten(1).mean(0)
        kept = bright[bright.nonzero().flatten()]
        return kept.mean() + images.mean((2, 3))


class Masking(nn.Module):
    """A classifier that indexes, first by numbers that are known, then by a mask."""

    def __init__(self, *, mask: bool) -> None:
        super().__init__()
        self.mask = mask
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = images.mean((2, 3))[:, self.order]
        return logits + logits[logits > 0].sum() if self.mask else logits


def suppressing() -> nn.Module:
    return Suppressing()


def masking() -> nn.Module:
    return Masking(mask=True)


def indexing() -> nn.Module:
    return Masking(mask=False)


@needs_tensorrt
@pytest.mark.parametrize(("factory", "operator"), [("suppressing", "aten::nonzero"), ("masking", "aten::index")])
def test_shapes_that_depend_on_the_data_are_named(factory: str, operator: str, tmp_path: Path) -> None:
    root = tmp_path / "models"
    config = replace(
        TINY, arch=f"tests.exporter.pipeline.test_engine_export:{factory}", input_size=(8, 8), repository=root
    )
    with pytest.raises(BadInput, match=f"{operator}, which returns as many rows as the data says"):
        run(config, Quiet())
    assert not root.exists()


@needs_tensorrt
def test_indexing_by_known_numbers_is_no_reason_to_refuse() -> None:
    config = replace(TINY, arch="tests.exporter.pipeline.test_engine_export:indexing", input_size=(8, 8))
    assert preflight.check(config, Quiet()).size.outputs == [[3]]


@needs_tensorrt
@pytest.mark.skipif(FOUND is not None and not FOUND.compiles_at_load, reason="TensorRT has such engines")
def test_tensorrt_rtx_has_no_version_compatible_engines() -> None:
    with pytest.raises(Missing, match=r"--version-compatible: TensorRT-RTX .* --defer-build"):
        preflight.check(replace(TINY, version_compatible=True), Quiet())


@needs_tensorrt
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BadInput("TensorRT cannot build this graph: for a test")

    monkeypatch.setattr(engine, "build", fail)
    with pytest.raises(BadInput, match="for a test"):
        run(replace(TINY, repository=tmp_path / "models"), Quiet())
    assert not (tmp_path / "models").exists()


@needs_tensorrt
def test_a_build_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    began = []

    class Watched(Quiet):
        def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
            began.append(label)
            return items

    progress = Interruptible(Watched(), lambda: any("build an engine" in label for label in began))
    with pytest.raises(KeyboardInterrupt):
        run(replace(TINY, repository=tmp_path / "models"), progress)
    assert "build an engine" in began[-1]
    assert not (tmp_path / "models").exists()


@needs_tensorrt
def test_what_was_published_can_be_built_again(digits: Published, tmp_path: Path) -> None:
    """`convoy build models/lenet5` keeps config and report true to the new file."""
    model = Path(shutil.copytree(digits.folder.parent, tmp_path / "lenet5"))
    plan = model / "1" / "model.plan"
    plan.write_bytes(b"of another version")
    assert rebuild(model, lambda options: options, Quiet()).plan == plan
    assert parameters(model) == parameters(digits.folder.parent)
    told = json.loads((model / "report.json").read_text())
    assert told["formats"][0]["sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert told["formats"][0].keys() == digits.report.formats[0].keys()
    assert told["engine"].keys() == json.loads(digits.report.to_json())["engine"].keys()
    assert told["formats"][0]["sha256"][:12] in (model / "report.md").read_text()


@needs_tensorrt
def test_the_other_commands_read_the_graph_beside_an_engine(
    digits: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan = digits.folder.parent, digits.folder / "model.plan"
    assert lint_command.lint([str(model), "--for", "tensorrt"]) == 0
    assert "model.onnx for TensorRT: 1 warning" in capsys.readouterr().out
    assert inspect_command.inspect([str(model)]) == 0
    assert compare([str(model)]) == 0
    shown = capsys.readouterr().out
    assert f"{model} is served from model.plan" in shown
    for command in (lint_command.lint, inspect_command.inspect):
        assert command([str(plan)]) == 2
        assert "is a TensorRT engine, which has no graph to read: name the model.onnx beside it" in (
            capsys.readouterr().err
        )
    lone = tmp_path / "lone" / "1" / "model.plan"
    lone.parent.mkdir(parents=True)
    lone.write_bytes(b"")
    assert lint_command.lint([str(tmp_path / "lone")]) == 2
    assert "name the ONNX file that it was built from" in capsys.readouterr().err


@needs_tensorrt
def test_a_sweep_builds_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "int8.toml"
    recipe.write_text('[[step]]\nstep = "int8"\n')
    root = tmp_path / "models"
    where = ["--arch", "lenet5", "--batch", "1:1:2", "--calibration-samples", "16", "--model-repository", str(root)]
    assert sweep([*where, "--format", "tensorrt", "--output", str(tmp_path / "out"), str(recipe), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["variant"]["bytes"] == (root / "lenet5-int8" / "1" / "model.plan").stat().st_size
    told = json.loads((root / "lenet5-int8" / "report.json").read_text())
    assert told["target"] == "gpu"
    assert told["engine"]["profiles"] == ["1:1:2"]


def test_an_engine_that_is_another_network_is_refused() -> None:
    graph = Parity("classification", 8, 0.1, 1e-2, "PyTorch", "ONNX Runtime", (1,), 1.0, 1.0, 0.99)
    graph = replace(graph, spread=Spread("classification", 8, 10, 10, 0.1))
    check_engine(graph, replace(graph, top1_agreement=0.95, spread=Spread("classification", 8, 10, 10, 0.5)))
    for apart in (
        replace(graph, top1_agreement=0.8),
        replace(graph, spread=Spread("classification", 8, 10, 10, 0.95)),
        replace(graph, spread=Spread("classification", 8, 10, 10, nan)),
        replace(graph, max_abs_error=nan),
    ):
        with pytest.raises(Refused, match="not the graph that it was built from"):
            check_engine(graph, apart)


def test_the_commands_that_the_documentation_shows_are_there() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["convoy.commands"]
    assert set(re.findall(r"\bconvoy ([a-z]+)", text)) <= commands.keys()
    shown = re.findall(r"^convoy export (.*?)(?: +#.*)?$", text, re.M)
    assert len(shown) == 3
    for flags in shown:
        cli._export_parser().parse_args(shlex.split(flags))
