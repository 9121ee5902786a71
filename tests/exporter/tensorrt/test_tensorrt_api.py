"""What `exporter/tensorrt` calls is what the public bindings of TensorRT 10 and 11 have, by name and by argument.

`make tensorrt-bindings` fetches them. They load without TensorRT's libraries as long as something of those names
defines what they look for: functions that do nothing, or, for a build through TensorRT 11's bindings, the libraries of
TensorRT-RTX.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from convoynet.exporter.tensorrt.library import find
from tests.exporter.engines import needs_tensorrt, pair
from tests.exporter.tensorrt_api import names_of

ROOT = Path(__file__).parents[3]
BINDINGS = ROOT / "build" / "tensorrt-bindings"
NAMES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# What the bindings look for in their libraries.
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def used_names() -> set[str]:
    """Every attribute that the package reads, of TensorRT's objects and of its own."""
    trees = (ast.parse(file.read_text()) for file in (ROOT / "exporter" / "tensorrt").glob("*.py"))
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def compile_stub(folder: Path, file: str, functions: Sequence[str] = FUNCTIONS) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, for libraries that do nothing")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / file), str(source)], check=True)


def run(major: int, libraries: Path, *arguments: str) -> dict[str, Any]:
    paths = [str(BINDINGS / str(major)), str(ROOT)]
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.exporter.tensorrt_api", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def need_bindings(major: int) -> None:
    if not (BINDINGS / str(major) / "tensorrt_bindings").is_dir():
        pytest.skip(f"needs TensorRT {major}'s bindings: make tensorrt-bindings")


@needs_tensorrt
@pytest.mark.parametrize("major", [10, 11])
def test_calls_are_those_of_the_public_api(major: int, tmp_path: Path) -> None:
    need_bindings(major)
    library = find()
    assert library is not None
    for name in NAMES:
        compile_stub(tmp_path, f"lib{name}.so.{major}")
    answer = run(major, tmp_path, "names")
    assert answer["version"].startswith(f"{major}.")
    there, here, used = answer["names"], names_of(library.module), used_names()
    # The calls are known to work with the library that is installed, which all other tests run.
    assert {"Builder", "OnnxParser", "Runtime", "IProgressMonitor", "BuilderFlag"} <= used & here[""].keys()
    assert sorted((used & here[""].keys()) - there[""].keys()) == []
    used |= {"__init__", "phase_start", "phase_finish", "step_complete"}
    different = {
        f"{kind}.{member}": (here[kind][member], there[kind].get(member))
        for kind in sorted(here.keys() & there.keys() - {""})
        for member in sorted(here[kind].keys() & used)
        if member not in there[kind] or not set(here[kind][member]) <= set(there[kind][member])
    }
    assert different == {}
    assert here["IOptimizationProfile"]["set_shape"] == ["self, input, min, opt, max"]


@needs_tensorrt
def test_a_build_through_the_bindings_of_tensorrt_11(tmp_path: Path) -> None:
    """TensorRT-RTX's libraries answer in the place of TensorRT's: this shows the calls, and nothing of its engines."""
    need_bindings(11)
    libs = pytest.importorskip("tensorrt_rtx_libs")
    folder = Path(libs.__file__).parent
    for name, stem in (("nvinfer", "libtensorrt_rtx"), ("nvonnxparser", "libtensorrt_onnxparser_rtx")):
        (tmp_path / f"lib{name}.so.11").symlink_to(next(folder.glob(f"{stem}.so*")))
    compile_stub(tmp_path, "libnvinfer_plugin.so.11", FUNCTIONS[-1:])
    graph, cache = tmp_path / "model.onnx", tmp_path / "kernels.cache"
    graph.write_bytes(pair(None, output_dtype=3))
    built = run(11, tmp_path, "build", str(graph), str(cache))
    assert built["library"] == "tensorrt"
    assert built["version"].startswith("11.")
    assert built["bytes"] > 10_000
    assert built["layers"] >= 2
    assert built["notes"] == []
    assert cache.stat().st_size > 0
