"""Which TensorRT is taken, and one clear line where there is none, or where it lacks what was asked for."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import helper

from convoynet.exporter.engine_options import MIB, BuildOptions, Profile, from_parameters, to_parameters
from convoynet.exporter.errors import BadInput, Missing
from convoynet.exporter.progress import Quiet
from convoynet.exporter.tensorrt import build as builder
from convoynet.exporter.tensorrt import gpu, library, words
from convoynet.exporter.tensorrt.build import BuiltEngine, build
from convoynet.exporter.tensorrt.gpu import Gpu
from convoynet.exporter.tensorrt.layers import Layer
from convoynet.exporter.tensorrt.library import Library
from tests.exporter.engines import model_of, needs_tensorrt, pair

OPTIONS = BuildOptions((Profile(1, 8, 64), Profile(1, 1, 1)))
INT8 = pair(np.array(0, np.int8))


class Installed:
    """Modules that stand for what is installed."""

    def __init__(self, **modules: Any) -> None:
        self.modules = modules

    def __call__(self, name: str) -> Any:
        if name not in self.modules:
            raise ModuleNotFoundError(name)
        return self.modules[name]


def tensorrt(version: str, *, gpu: bool = True) -> Any:
    """A TensorRT, whose builder begins with a look at the GPU."""

    def no_gpu(logger: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    class ILogger:
        pass

    module = ModuleType("tensorrt")
    made = (lambda logger: logger) if gpu else no_gpu
    vars(module).update(__version__=version, Builder=made, OnnxParser=object, ILogger=ILogger)
    return module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def install(**modules: Any) -> None:
        monkeypatch.setattr(importlib, "import_module", Installed(**modules))
        library.find.cache_clear()
        library._load.cache_clear()

    yield install
    monkeypatch.undo()
    library.find.cache_clear()
    library._load.cache_clear()


def test_tensorrt_comes_first_where_it_builds(install: Any) -> None:
    install(tensorrt=tensorrt("10.12.0.36"), tensorrt_rtx=tensorrt("1.7.1.116"))
    found = library.require()
    assert (found.name, found.version, found.compiles_at_load) == ("tensorrt", "10.12.0.36", False)
    assert found.title == "TensorRT 10.12.0.36"


@pytest.mark.parametrize("first", [tensorrt("10.12.0.36", gpu=False), tensorrt("10.11.9")])
def test_tensorrt_rtx_stands_in(install: Any, first: Any) -> None:
    install(tensorrt=first, tensorrt_rtx=tensorrt("1.7.1.116"))
    found = library.require()
    assert (found.title, found.compiles_at_load) == ("TensorRT-RTX 1.7.1.116", True)


@pytest.mark.parametrize(
    ("modules", "line"),
    [
        ({}, "TensorRT is not installed: pip install tensorrt on a machine with the GPU, or tensorrt-rtx"),
        ({"tensorrt": SimpleNamespace(__version__="10.13")}, "TensorRT is not installed"),  # PyPI's without libraries
        ({"tensorrt": tensorrt("10.13", gpu=False)}, "TensorRT 10.13 builds only where there is an NVIDIA GPU"),
        ({"tensorrt": tensorrt("8.6.1")}, r"TensorRT 8.6.1 is older than 10\.12"),
    ],
)
def test_without_a_builder_the_line_says_what_to_do(install: Any, modules: dict[str, Any], line: str) -> None:
    install(**modules)
    assert library.find() is None
    with pytest.raises(Missing, match=line) as error:
        build(INT8, OPTIONS, Quiet())
    assert error.value.exit_code == 4
    assert "pip install" in str(error.value)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"version_compatible": True}, "TensorRT-RTX has no version-compatible engines: leave --version-compatible"),
        ({"refit": "strip"}, "TensorRT-RTX builds plans for --strip on a GPU alone"),
        ({"refit": "refit"}, "--refit on a GPU alone, and there is none here"),
    ],
)
def test_what_tensorrt_rtx_lacks(more: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = Library("tensorrt_rtx", "1.7.1.116", None)
    monkeypatch.setattr(builder, "require", lambda: rtx)
    monkeypatch.setattr(builder, "find_gpu", lambda: None)
    with pytest.raises(Missing, match=line):
        build(INT8, BuildOptions((Profile(1, 1, 1),), **more), Quiet())


@needs_tensorrt
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_the_timing_cache_is_kept_between_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library that is here in the place of TensorRT, whose calls it has."""
    here = library.require()
    monkeypatch.setattr(builder, "require", lambda: Library("tensorrt", "10.13.2", here.module))
    monkeypatch.setattr(builder, "find_gpu", lambda: Gpu("9.0", "580.65.06"))
    monkeypatch.setattr(builder, "_inspect", lambda library, content: None)
    cache = tmp_path / "kernels"
    options = BuildOptions((Profile(1, 2, 4),), timing_cache=cache)
    built = build(INT8, options, Quiet())
    kept = cache.read_bytes()
    assert kept
    assert (built.compute_capability, built.driver_version) == ("9.0", "580.65.06")
    assert built.runs_on == "an engine for GPUs of compute capability 9.0 and TensorRT 10.13.2"
    assert not built.is_portable
    assert build(INT8, options, Quiet()).notes == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels"]
    with pytest.raises(BadInput, match=r"timing cache .*: Is a directory"):
        build(INT8, BuildOptions((Profile(1, 2, 4),), timing_cache=tmp_path), Quiet())


def test_a_timing_cache_of_another_gpu_is_begun_anew(tmp_path: Path) -> None:
    class Config:
        given: tuple[bytes, ...] = ()

        def create_timing_cache(self, content: bytes) -> bytes:
            return content

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            self.given += (cache,)
            return cache == b""

        def get_timing_cache(self) -> Any:
            return SimpleNamespace(serialize=lambda: b"measured")

    file = tmp_path / "kernels"
    file.write_bytes(b"of another GPU")
    config, notes = Config(), list[str]()
    with builder._timing_cache(Library("tensorrt", "11.4", None), config, file, notes):
        assert config.given == (b"of another GPU", b"")
        assert file.read_bytes() == b"of another GPU"
    assert file.read_bytes() == b"measured"
    assert notes == [f"timing cache {file} is of another GPU or version: it was begun anew"]


def test_fp8_needs_ada() -> None:
    found = (Layer("x.q", "QUANTIZE", "fp8", ("fp32",)),)
    with pytest.raises(BadInput, match=r"quantize 'x\.q' is in FP8, which needs .* 8\.9 .* has 8\.6: export --int8"):
        builder._require_fp8(Library("tensorrt", "10.13", None), Gpu("8.6", ""), found)
    for capability in ("8.9", "12.0"):
        builder._require_fp8(Library("tensorrt", "10.13", None), Gpu(capability, ""), found)
    builder._require_fp8(Library("tensorrt_rtx", "1.7", None), Gpu("8.6", ""), found)


# As TensorRT's users report them; those with a place in its source were seen here, from TensorRT-RTX 1.7.
BUILDER_ERRORS = [
    (
        "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation for node "
        "conv1 + relu due to insufficient workspace. See verbose log for requested sizes.)",
        r"'conv1 \+ relu' needs more scratch memory than 16 MiB: give a larger --workspace-mib",
    ),
    (
        "Error Code 1: Myelin ([tactic.cpp:1676: enumerate_tactics] Tactic Selection: no tactics to implement the "
        "operation within workspace limit. In compileGraph at /_src/optimizer/myelin/codeGenerator.cpp:2012)",
        "a layer needs more scratch memory than 16 MiB",
    ),
    (
        "[virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (Requested size was 8 bytes.)",
        "too little memory to build a layer for 64 images: .*lower the largest batch of --batch",
    ),
    ("Requested amount of GPU memory (150994944 bytes) could not be allocated.", "too little memory .* 64 images"),
    ("std::bad_alloc", "too little memory"),
    (
        "Error Code 9: API Usage Error (Networks with FP8 Q/DQ layers require hardware with FP8 support.)",
        "this GPU has no FP8: .*export another precision",
    ),
    (
        "Error Code 10: Internal Error (Could not find any implementation for node up.)",
        "no kernel for 'up' on this GPU",
    ),
    ("CUDA initialization failure with error: 35.", "needs a GPU, and CUDA finds none"),
    (
        "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (Something new. In f at /_src/a/b.cpp:1)",
        r"cannot build this graph: Something new\.; convoy lint",
    ),
]


@pytest.mark.parametrize(("said", "line"), BUILDER_ERRORS)
def test_the_builders_errors_in_one_line(said: str, line: str) -> None:
    noise = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35: insufficient)"
    told = words.of_builder([said, noise], BuildOptions((Profile(1, 8, 64),), workspace_bytes=16 * MIB))
    assert told.startswith("TensorRT cannot build this graph: ")
    assert re.search(line, told), told


def test_no_reason_is_said_so() -> None:
    assert "the builder gave no reason" in words.of_builder([], OPTIONS)


@pytest.mark.parametrize(
    ("text", "profile"), [("1:8:64", (1, 8, 64)), ("1:64", (1, 8, 64)), ("2:4", (2, 4, 4)), ("16:64", (16, 16, 64))]
)
def test_profiles_are_read(text: str, profile: tuple[int, int, int]) -> None:
    assert Profile.parse(text) == Profile(*profile)
    assert str(Profile.parse("8")) == "8:8:8"


@pytest.mark.parametrize("text", ["", "1:2:3:4", "a", "0", "4:2", "1:9:8", "1:-1"])
def test_profiles_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match=r"batch .*1:8:64"):
        Profile.parse(text)


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        BuildOptions((Profile(1, 1, 1),), 0, 512 * MIB, None, True, True, True, "refit"),
        BuildOptions((Profile(1, 1, 1),), 5, sparse_weights=True, refit="strip"),
    ],
)
def test_options_pass_through_a_config(options: BuildOptions) -> None:
    assert from_parameters({"task": "classification", **to_parameters(options)}) == options
    assert to_parameters(OPTIONS) == {"tensorrt_profiles": "1:8:64,1:1:1"}


@pytest.mark.parametrize(
    ("parameters", "line"),
    [
        ({}, "no parameter tensorrt_profiles"),
        ({"tensorrt_profiles": "1:8:64", "tensorrt_workspace_mib": "lots"}, "tensorrt_workspace_mib 'lots' is no num"),
        ({"tensorrt_profiles": "1", "tensorrt_refit": "yes"}, "tensorrt_refit 'yes' is not refit or strip"),
        ({"tensorrt_profiles": "1", "tensorrt_optimization_level": "6"}, r"optimization level 6 is not in 0\.\.5"),
        ({"tensorrt_profiles": "1", "tensorrt_workspace_mib": "0"}, "0 bytes is too little"),
    ],
)
def test_configs_that_cannot_be_built_from(parameters: dict[str, str], line: str) -> None:
    with pytest.raises(BadInput, match=line):
        from_parameters(parameters)


def test_without_a_driver_there_is_no_gpu() -> None:
    pytest.importorskip("cuda.bindings.driver")
    found = gpu.find_gpu()
    if Path("/dev/nvidiactl").exists():
        assert found is not None
        assert found.compute_capability.replace(".", "").isdigit()
    else:
        assert found is None


def test_the_portable_engine_says_where_it_runs() -> None:
    engine = BuiltEngine(b"", "tensorrt_rtx", "1.7.1.116", "any", "", 0.0, ())
    assert "compiles on the GPU that loads it" in engine.runs_on
    assert "8.0, 8.6, 8.9, 12.0" in engine.runs_on


@needs_tensorrt
def test_without_onnx_only_what_was_linted_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relu = model_of([helper.make_node("Relu", ["x"], ["y"])], {})
    odd = model_of([helper.make_node("Nonsense", ["x"], ["y"], name="odd")], {})
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "convoynet.exporter.graph.onnx_read", raising=False)  # it has onnx already
    options = BuildOptions((Profile(1, 1, 1),))
    assert build(relu, options, Quiet()).content
    with pytest.raises(Missing, match="misread UINT8 without a word: pip install onnx"):
        build(INT8, options, Quiet())
    with pytest.raises(BadInput, match=r"Nonsense 'odd': TensorRT has no such operator, and no plugin"):
        build(odd, options, Quiet())
    with pytest.raises(BadInput, match="these bytes: no ONNX model"):
        build(b"nothing", options, Quiet())
    version = tmp_path / "net" / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(INT8)
    with pytest.raises(Missing, match="pip install onnx"):
        build(version / "model.onnx", options, Quiet())
    (tmp_path / "net" / "config.pbtxt").write_text('parameters { key: "target" value { string_value: "gpu" } }')
    assert build(version / "model.onnx", options, Quiet()).content
