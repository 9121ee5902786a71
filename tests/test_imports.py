"""The arrows: who may import whom, proved in a process where the rest cannot be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.onnx_models import write_linear

ROOT = Path(__file__).parents[1]
RUNTIMES = (
    "convoynet.server.engines.onnxrt",
    "convoynet.server.engines.onnxrt_binding",
    "convoynet.server.engines.openvino",
)
"""The modules that import what runs a model."""

BLOCK = """
import importlib, pkgutil, sys

def forbidden(name):
    return any(name == each or name.startswith(each + ".") for each in {blocked!r})

class Block:
    def find_spec(self, name, path=None, target=None):
        if forbidden(name):
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
for name in {modules!r}:
    importlib.import_module(name)
loaded = [name for name in sys.modules if forbidden(name)]
assert not loaded, loaded
"""


def modules(package: str) -> list[str]:
    """Every module of a package, by its dotted name."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files]
    return [f"convoynet.{name}" for name in names]


@pytest.mark.parametrize(
    ("imported", "blocked"),
    [
        (
            modules("server"),
            [
                "convoynet.exporter",
                "torch",
                "torchvision",
                "onnx",
                "onnxscript",
                "matplotlib",
                "tensorrt",
                "opentelemetry",
            ],
        ),
        (
            [m for m in modules("server") if m not in RUNTIMES],
            ["convoynet.exporter", "torch", "onnx", "onnxruntime", "openvino"],
        ),
        (
            ["convoynet.server.engines.child"],
            [
                "grpc",
                "google",
                "convoynet.protos",
                "PIL",
                "uvloop",
                "prometheus_client",
                "asyncio",
                "onnxruntime",
                "openvino",
            ],
        ),
        (
            [
                "convoynet.exporter.commands.cli",
                "convoynet.exporter.commands.explain_command",
                "convoynet.exporter.commands.inspect_command",
                "convoynet.exporter.commands.audit_command",
                "convoynet.exporter.commands.lint_command",
                "convoynet.exporter.config",
                "convoynet.exporter.errors",
            ],
            ["convoynet.server", "torch", "onnx", "onnxruntime"],
        ),
        (
            [
                "convoynet.exporter.commands.build_command",
                "convoynet.exporter.tensorrt.build",
                "convoynet.exporter.publishing.model_folder",
            ],
            ["convoynet.server", "torch", "onnx", "tensorrt", "tensorrt_rtx", "cuda"],
        ),
        (
            [
                "convoynet.exporter.archs",
                "convoynet.exporter.archs.facts",
                "convoynet.exporter.pipeline.first_look",
                "convoynet.exporter.studies.compare",
                "convoynet.exporter.studies.sweep",
            ],
            ["convoynet.server", "torch", "onnx", "onnxruntime", "matplotlib", "jinja2", "tensorrt", "tensorrt_rtx"],
        ),
        (modules("exporter"), ["convoynet.server", "grpc"]),
    ],
    ids=[
        "server without the exporter's libraries",
        "server without an engine",
        "engine process",
        "export --help",
        "convoy build",
        "first look",
        "exporter",
    ],
)
def test_imports_without(imported: list[str], blocked: list[str]) -> None:
    code = BLOCK.format(blocked=blocked, modules=imported)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


RUN = """
import asyncio, pathlib, sys
import numpy as np
from convoynet.server.repository import repository
from convoynet.server.engines.process import EngineProcess

async def main():
    (found,) = repository.scan(pathlib.Path({root!r}), repository.Defaults(4, 1))
    process = await EngineProcess.start(found.spec)
    result = await process.run([dict(input=np.ones((1, 4), np.float32))])
    await process.close()
    return result.answers[0]["logits"].tolist()

assert asyncio.run(main()) == [[1.5, 2, 2]]
assert not set(sys.modules) & {{"onnxruntime", "openvino"}}
"""


def test_the_server_runs_engines_that_it_does_not_import(tmp_path: Path) -> None:
    write_linear(tmp_path)
    code = BLOCK.format(
        blocked=["onnxruntime", "openvino", "convoynet.exporter", "torch", "onnx"], modules=["convoynet.server.app"]
    )
    done = subprocess.run(
        [sys.executable, "-c", code + RUN.format(root=str(tmp_path))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def imports_of(file: Path) -> set[str]:
    """The top-level names that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize(("package", "other"), [("server", "exporter"), ("exporter", "server")])
def test_neither_package_names_the_other(package: str, other: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        assert not {n for n in imports_of(file) if n.startswith(f"convoynet.{other}")}, file


# From the top: a room, or a module of the ground floor, imports what stands below it in these lists, never above.
ROOMS = {
    "server": (
        *("cli", "explaining"),
        *("api", "serve", "app", "frontend", "http2", "http", "protocol", "settings", "config", "models"),
        "repository",
        *("engines", "scheduling", "observing", "client", "memory", "security", "supervision"),
        *("spec", "images", "datatypes", "types", "status", "errors", "host", "gpus"),
    ),
    "exporter": (
        *(
            "commands",
            "studies",
            "pipeline",
            "looking",
            "auditing",
            "publishing",
            "evidence",
            "tensorrt",
            "linting",
            "quantization",
        ),
        *("compression", "running", "inspecting", "explaining", "archs", "graph", "data"),
        *(
            "config",
            "engine_asked",
            "outputs_asked",
            "onnx_asked",
            "recipe",
            "engine_options",
            "progress",
            "interrupts",
            "atomic_file",
            "errors",
            "assets",
        ),
    ),
}
MAX_FLAT = 12


@pytest.mark.parametrize("package", ROOMS)
def test_no_room_imports_one_above_it(package: str) -> None:
    order, upward = ROOMS[package], []
    for file in sorted((ROOT / package).rglob("*.py")):
        room = file.relative_to(ROOT / package).with_suffix("").parts[0]
        if room == "__init__":
            continue
        assert room in order, f"{file}: a new room, or a module flat in {package}/: give it a place in ROOMS"
        for name in imports_of(file):
            other = name.removeprefix(f"convoynet.{package}.").partition(".")[0]
            if name.startswith(f"convoynet.{package}.") and other != room and order.index(other) < order.index(room):
                upward.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not upward


@pytest.mark.parametrize("package", ROOMS)
def test_the_ground_floor_is_short_and_every_room_is_there(package: str) -> None:
    flat = {file.stem for file in (ROOT / package).glob("*.py")} - {"__init__"}
    folders = {file.parent.name for file in (ROOT / package).glob("*/__init__.py")}
    assert flat | folders == set(ROOMS[package])
    assert len(flat) <= MAX_FLAT


@pytest.mark.parametrize("package", ROOMS)
def test_the_tests_mirror_the_rooms(package: str) -> None:
    rooms = {file.parent.name for file in (ROOT / package).glob("*/__init__.py")}
    tested = {file.parent.name for file in (ROOT / "tests" / package).glob("*/test_*.py")}
    assert tested <= rooms


def test_everything_is_imported_by_the_one_name() -> None:
    """`import server`, say, would work in the repository's root, and load everything a second time."""
    for folder in ("exporter", "server", "tests", "benchmarks", "docs", "deploy"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not {n for n in imports_of(file) if n.partition(".")[0] in ("exporter", "server", "protos")}, file


PUBLIC = """
import sys
import convoynet
assert not {"grpc", "torch", "numpy", "onnx"} & set(sys.modules)
assert set(convoynet.__all__) <= set(dir(convoynet))
for name in convoynet.__all__:
    assert getattr(convoynet, name).__name__ == name
try:
    convoynet.Clinet
except AttributeError as error:
    assert "'convoynet' has no attribute 'Clinet'" in str(error)
else:
    raise AssertionError
"""


def test_the_public_names_are_there_and_loaded_when_they_are_used() -> None:
    subprocess.run([sys.executable, "-c", PUBLIC], check=True)


def test_protobuf_stays_at_the_edges() -> None:
    edges = {
        "codec.py",
        "answers.py",
        "service.py",
        "dispatch.py",
        "api.py",
        "handlers.py",
        "openapi.py",
        "json_tensors.py",
        "listeners.py",
        "app.py",
        "health.py",
        "local.py",
        "companions.py",
        "repository.py",
        "specs.py",
        "client.py",
        "async_client.py",
        "operations.py",
        "predict.py",
        "subject.py",
        "asking.py",
        "client_codec.py",
        "load.py",
        "loaded.py",
        "lone_files.py",
        "batch_config.py",
        "parameters.py",
        "plan_config.py",
        "model_config.py",
        "labels.py",
        "warmup.py",
        "tensors.py",
        "completion.py",
        "wire.py",
        "forms.py",
        "repository_service.py",
        "settings_service.py",
        "instance_groups.py",
        "service_load.py",
        "shared_memory_service.py",
        "verified_engines.py",
    }
    users = {
        f.name
        for f in (ROOT / "server").rglob("*.py")
        if any(n.startswith(("convoynet.protos", "grpc_health", "google.protobuf")) for n in imports_of(f))
    }
    assert users <= edges


def test_no_wall_clock_decides_anything() -> None:
    """Deadlines and durations come from monotonic clocks; time_ns() stamps last_inference and new series alone."""
    for file in (ROOT / "server").rglob("*.py"):
        assert "time.time()" not in file.read_text(), file
