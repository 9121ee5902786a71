"""The engines, by the backend name of config.pbtxt; each is imported only in the process that runs it."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from convoynet.processor import adds_in_16_bits
from convoynet.server.engines.base import Engine, EngineSpec, check_files
from convoynet.server.engines.finite import FiniteEngine
from convoynet.server.engines.onnx_file import read_onnx
from convoynet.server.engines.onnx_part import cut_out
from convoynet.server.engines.seldom import SeldomEngine
from convoynet.server.errors import InvalidModel
from convoynet.server.gpus import visible_gpus
from convoynet.server.spec import EngineOptions

_ENGINES = {
    "fake": "convoynet.server.engines.fake:FakeEngine",
    "onnxruntime": "convoynet.server.engines.onnxrt:OnnxRuntimeEngine",
    "openvino": "convoynet.server.engines.openvino:OpenVinoEngine",
    "tensorrt": "convoynet.server.engines.tensorrt:TensorRtEngine",
}


@dataclass(frozen=True)
class Loaded:
    """An engine that is warm.

    Attributes:
        engine: It.
        seconds: What loading took, without the warm-up.
        passed_over: Why the engine that would have been preferred does not run the model; "" where it does.
        cold: Why it is not warm after all, where the config does not say how to warm it up; else "".
    """

    engine: Engine
    seconds: float
    passed_over: str = ""
    cold: str = ""


def choose(options: EngineOptions) -> tuple[str, ...]:
    """The engines that may run a model, the preferred one first.

    Backend "onnxruntime" is about the file, an ONNX graph. OpenVINO computes those faster than ONNX Runtime on x86
    CPUs, so that it comes first there, where it is installed and config.pbtxt does not say otherwise; but of INT8 on
    those without VNNI ONNX Runtime computes the sums that do not overflow, and comes first. Where an export
    measured the model in some of the engines that are here, only those are taken that it verified; one that it excluded
    is not taken, unless config.pbtxt asks for it.

    Raises:
        InvalidModel: Every engine that is here is excluded.
    """
    if options.backend != "onnxruntime":
        return (options.backend,)
    if options.engine:
        return (options.engine,)
    usual = usual_engines(options)
    allowed = tuple(name for name in usual if name not in options.excluded)
    if not allowed:
        name = usual[0]
        raise InvalidModel(
            f"the export excluded {' and '.join(usual)}, and no other engine for it is here: "
            f"{options.excluded[name]}; install one that it verified ({', '.join(options.verified) or 'none'}), or set "
            f'parameters["engine"] to {name} to serve it all the same'
        )
    return tuple(name for name in allowed if name in options.verified) or allowed


def usual_engines(options: EngineOptions) -> tuple[str, ...]:
    """The engines that are here for an ONNX graph, the preferred one first, whatever an export found out."""
    cpu = options.device == "cpu" or (options.device == "auto" and not visible_gpus())
    if not cpu or platform.machine() not in ("x86_64", "AMD64") or find_spec("openvino") is None:
        return ("onnxruntime",)
    if not find_spec("onnxruntime"):
        return ("openvino",)
    inexact = adds_in_16_bits() and _is_quantized(options.file)
    return ("onnxruntime", "openvino") if inexact else ("openvino", "onnxruntime")


def _is_quantized(file: Path) -> bool:
    try:
        return read_onnx(file).is_quantized
    except (InvalidModel, OSError):  # which is told where it is loaded
        return False


def make(name: str, spec: EngineSpec, **more: Any) -> Engine:
    """Makes an engine by its name, in the process that will run it. Nothing is run yet.

    Args:
        name: One of those that choose() gives.
        spec: Of the model.
        more: What this engine takes besides.

    Raises:
        InvalidModel: It is not installed, does not take the model, or a file is not the one that was checked.
    """
    module, _, attribute = _ENGINES[name].partition(":")
    check_files(spec.options)
    try:
        made = getattr(import_module(module), attribute)
        engine: Engine = made(spec, **more)
        if spec.seldom and _can_be_cut(name, spec):
            usual = replace(spec, outputs=tuple(t for t in spec.outputs if t.name in spec.usual), optional=())
            engine = SeldomEngine(made(usual, content=cut_out(spec.options.file, spec.usual), **more), engine, spec)
    except ModuleNotFoundError as error:
        raise InvalidModel(
            f"engine '{name}' needs the module {error.name}: "
            "pip install 'convoynet[cpu]' (or 'convoynet[gpu]' on a machine with an NVIDIA GPU)"
        ) from error
    try:
        check_files(spec.options)
    except InvalidModel:
        engine.close()
        raise
    return engine


def _can_be_cut(name: str, spec: EngineSpec) -> bool:
    """Whether an engine takes a part of a graph: of an ONNX file that has its weights in itself."""
    file = spec.options.file
    return name in ("onnxruntime", "openvino") and file.suffix == ".onnx" and not read_onnx(file).external


def load(spec: EngineSpec) -> Loaded:
    """Makes the engine of a model and warms it up, in the process that will run it.

    An engine that config.pbtxt does not name must load the file, run the warm-up, and make finite numbers of it; where
    it does not, the next one that may is taken. (Whether it computes rightly was found out before: see trial.)

    Raises:
        InvalidModel: The engine is not installed, or does not take the model; the message says why.
    """
    passed_over = ""
    *preferred, last = choose(spec.options)
    for name in preferred:
        try:
            return _load(name, spec, preferred=True)
        except InvalidModel as error:
            passed_over = str(error)
    return replace(_load(last, spec, preferred=False), passed_over=passed_over)


def _load(name: str, spec: EngineSpec, *, preferred: bool) -> Loaded:
    begun = time.perf_counter()
    engine = make(name, spec)
    loaded = Loaded(engine, time.perf_counter() - begun)
    try:
        _warm_up(engine, spec, finite=preferred)
    except InvalidModel as error:
        # What a GPU does after an error, nobody knows.
        if preferred or spec.warmup_stated or name == "tensorrt":
            engine.close()
            raise
        loaded = replace(loaded, cold=str(error))
    if spec.options.finite_only and name == "openvino":
        return replace(loaded, engine=FiniteEngine(engine, lambda: make("onnxruntime", spec), spec))
    return loaded


def _warm_up(engine: Engine, spec: EngineSpec, *, finite: bool) -> None:
    for rows in spec.warmup:
        try:
            answer = dict(engine.run(spec.blank(rows)))
            if spec.seldom:
                answer |= engine.run(spec.blank(rows), spec.usual)
        except Exception as error:
            raise InvalidModel(f"the warm-up with a batch of {rows} failed: {error}") from error
        for name, values in answer.items():
            if finite and values.dtype.kind == "f" and not np.isfinite(values).all():
                raise InvalidModel(
                    f"output '{name}' of the warm-up with a batch of {rows} has values that are not finite"
                )
