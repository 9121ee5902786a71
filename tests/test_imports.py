"""The arrows: who may import whom, proved in a process where the rest cannot be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.onnx_models import write_linear

ROOT = Path(__file__).parents[1]
RUNTIMES = ("server.engines.onnxrt", "server.engines.onnxrt_binding", "server.engines.openvino")
"""The modules that import what runs a model."""

BLOCK = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
for name in {modules!r}:
    importlib.import_module(name)
loaded = {{m.partition(".")[0] for m in sys.modules}} & set({blocked!r})
assert not loaded, loaded
"""


def modules(package: str) -> list[str]:
    """Every module of a package, by its dotted name."""
    files = sorted((ROOT / package).rglob("*.py"))
    return [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files]


@pytest.mark.parametrize(
    ("imported", "blocked"),
    [
        (
            modules("server"),
            ["exporter", "torch", "torchvision", "onnx", "onnxscript", "matplotlib", "tensorrt", "opentelemetry"],
        ),
        (
            [m for m in modules("server") if m not in RUNTIMES],
            ["exporter", "torch", "onnx", "onnxruntime", "openvino"],
        ),
        (
            ["server.engines.child"],
            ["grpc", "google", "protos", "PIL", "uvloop", "prometheus_client", "asyncio", "onnxruntime", "openvino"],
        ),
        (
            [
                "exporter.commands.cli",
                "exporter.commands.inspect_command",
                "exporter.commands.lint_command",
                "exporter.config",
                "exporter.errors",
            ],
            ["server", "torch", "onnx", "onnxruntime"],
        ),
        (
            ["exporter.commands.build_command", "exporter.tensorrt.build", "exporter.publishing.model_folder"],
            ["server", "torch", "onnx", "tensorrt", "tensorrt_rtx", "cuda"],
        ),
        (modules("exporter"), ["server", "grpc"]),
    ],
    ids=[
        "server without the exporter's libraries",
        "server without an engine",
        "engine process",
        "export --help",
        "convoy build",
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
from server.repository import repository
from server.engines.process import EngineProcess

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
    code = BLOCK.format(blocked=["onnxruntime", "openvino", "exporter", "torch", "onnx"], modules=["server.app"])
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
        assert not {n for n in imports_of(file) if n.partition(".")[0] == other}, file


def test_protobuf_stays_at_the_edges() -> None:
    edges = {
        "codec.py",
        "service.py",
        "dispatch.py",
        "http_api.py",
        "http_handlers.py",
        "http_json.py",
        "listeners.py",
        "app.py",
        "health.py",
        "local.py",
        "repository.py",
        "client.py",
        "client_codec.py",
        "load.py",
        "batch_config.py",
        "parameters.py",
        "plan_config.py",
        "servicer.py",
        "model_config.py",
        "completion.py",
        "wire.py",
        "repository_service.py",
        "settings_service.py",
        "instance_groups.py",
        "shared_memory_service.py",
    }
    users = {
        f.name
        for f in (ROOT / "server").rglob("*.py")
        if any(n.startswith(("protos", "grpc_health", "google.protobuf")) for n in imports_of(f))
    }
    assert users <= edges


def test_no_wall_clock_decides_anything() -> None:
    """Deadlines and durations come from monotonic clocks; time_ns() stamps last_inference and new series alone."""
    for file in (ROOT / "server").rglob("*.py"):
        assert "time.time()" not in file.read_text(), file
