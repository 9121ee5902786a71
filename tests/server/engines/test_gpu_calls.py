"""What our code calls of CUDA and of TensorRT is there, and takes what it is given, as far as no GPU is needed."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convoynet.server.engines import tensorrt as engine
from convoynet.server.engines.device import DeviceError, Event, Stream
from tests.exporter.tensorrt.test_tensorrt_api import NAMES, compile_stub, need_bindings, run
from tests.server import simulated_tensorrt

ENGINES = Path(engine.__file__).parent
LIBRARY = {
    "": ("trt", "_trt"),
    "IRuntimeConfig": ("config",),
    "Runtime": ("_runtime",),
    "ICudaEngine": ("engine", "_engine"),
    "IExecutionContext": ("context",),
}
"""Of each class of TensorRT, what our code calls its instances; "" is the module."""


def calls(file: Path, base: str) -> list[ast.Call]:
    """The calls `base.name(...)` in a module."""
    return [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == base
    ]


def test_every_call_of_cuda_has_the_arguments_of_its_signature() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is an extra")
    found = [c for c in calls(ENGINES / "cuda_device.py", "cuda") if c.func.attr.startswith("cuda")]  # type: ignore[attr-defined]
    assert len(found) >= 15
    for call in found:
        assert isinstance(call.func, ast.Attribute)
        inspect.signature(getattr(cuda, call.func.attr)).bind(*call.args)


def test_every_call_of_cuda_takes_what_it_is_given() -> None:
    """They really are called, with the types of a GPU: without a driver each refuses, but none has a TypeError."""
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is an extra")
    from convoynet.server.engines.cuda_device import CudaDevice

    if cuda.cudaGetDeviceCount()[0] == cuda.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU: handles that are made up would crash it")
    device: Any = CudaDevice.__new__(CudaDevice)
    stream, event = Stream(7), Event(8)
    asked: list[tuple[str, Any]] = [
        ("__init__", [0]),
        ("memory", []),
        ("allocate", [1 << 40]),
        ("pin", [np.zeros(64, np.uint8)]),
        ("stream", []),
        ("event", []),
        ("copy_in", [1 << 44, 1 << 45, 64, stream]),
        ("copy_out", [1 << 45, 1 << 44, 64, stream]),
        ("record", [event, stream]),
        ("wait", [stream, event]),
        ("synchronize", [event]),
        ("capture", [stream, lambda: None]),
        ("launch", [cuda.cudaGraphExec_t(9), stream]),
    ]
    for name, arguments in asked:
        with pytest.raises(DeviceError, match=r"\(cudaError"):
            getattr(device, name)(*arguments)


def asked() -> set[tuple[str, str]]:
    """What our code reads of TensorRT: the class, "" for the module, and the name."""
    found = set()
    for node in ast.walk(ast.parse((ENGINES / "tensorrt.py").read_text())):
        if isinstance(node, ast.Attribute):
            base = ast.unparse(node.value).removeprefix("self.")
            found |= {(kind, node.attr) for kind, names in LIBRARY.items() if base in names}
    assert {"execute_async_v3", "set_device_memory", "deserialize_cuda_engine"} <= {name for _, name in found}
    return found - {("", name) for name in ("__name__", "__version__")}


def test_all_that_is_asked_of_tensorrt_rtx_is_there() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an extra")
    for kind, name in asked():
        assert hasattr(getattr(trt, kind) if kind else trt, name), f"{kind}.{name}"
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    for name in engine._DATATYPES:
        assert hasattr(trt.DataType, name)


@pytest.mark.parametrize("major", [10, 11])
def test_all_that_is_asked_of_tensorrt_is_there(major: int, tmp_path: Path) -> None:
    need_bindings(major)
    for name in NAMES:
        compile_stub(tmp_path, f"lib{name}.so.{major}")
    there = run(major, tmp_path, "names")["names"]
    missing = {(kind, name) for kind, name in asked() if name not in there[kind]}
    # These are asked of TensorRT-RTX alone, which is known by the first.
    assert missing == {
        ("", "DynamicShapesKernelSpecializationStrategy"),
        ("IRuntimeConfig", "create_runtime_cache"),
        ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
        ("IRuntimeConfig", "set_runtime_cache"),
    }


def test_the_simulated_tensorrt_has_nothing_of_its_own() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an extra")
    for ours, theirs in (
        (simulated_tensorrt.Engine, trt.ICudaEngine),
        (simulated_tensorrt.Context, trt.IExecutionContext),
    ):
        methods = [n for n, m in vars(ours).items() if inspect.isfunction(m) and not n.startswith("_")]
        assert methods
        for name in methods:
            theirs_text = getattr(theirs, name).__doc__
            for parameter in list(inspect.signature(getattr(ours, name)).parameters)[1:]:
                assert parameter in theirs_text, f"{name}({parameter})"


def test_the_real_tensorrt_refuses_what_is_no_plan_in_one_line(tmp_path: Path) -> None:
    """As much of the real library as runs without a GPU: its runtime, our logger, its refusal."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an extra")
    log = engine._logger(trt)
    assert trt.Runtime(log).deserialize_cuda_engine(b"not a plan") is None
    assert log.last
    assert "\n" not in log.last
